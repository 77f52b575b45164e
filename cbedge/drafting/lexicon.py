"""The words of a model's training reports, as hashes: what is drawn from a language model stays in words.

A subword language model can join pieces of words into words that do not exist, once anything but its first choice is
taken: sampling, beams, a ban on repetition. So a token may only continue a word of the training reports, or of the
texts that come with a study. Text is cut into runs of letters (words) and runs of anything else (gaps: spaces,
punctuation, digits); the lexicon holds both, and everything that one begins with, as 31-bit hashes. No report can be
read from it.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.errors import BundleError

_RUN = re.compile(r"[^\W\d_]+|[\W\d_]+")
_HEADINGS = frozenset(("FINDINGS", "IMPRESSION"))  # never inside a sentence
REPORTS_WITH_WORD = 2  # that a word must be found in; a word of one report may be a name or a slip
REPORTS_WITH_GAP = 10


class Lexicon:
    """Known words and gaps.

    Args:
        whole: hashes of the words and gaps.
        begun: hashes of everything that one of them begins with, itself included.
    """

    def __init__(self, whole: Iterable[int], begun: Iterable[int]):
        self._whole, self._begun = frozenset(whole), frozenset(begun)

    def __len__(self) -> int:
        return len(self._whole)

    @classmethod
    def compile(cls, reports: Iterable[str]) -> Lexicon:
        """Learn from reports without their headings: words of at least :data:`REPORTS_WITH_WORD` reports, gaps of at
        least :data:`REPORTS_WITH_GAP`."""
        counts: Counter[str] = Counter()
        for report in reports:
            counts.update({*_RUN.findall(f" {report}")} - _HEADINGS)
        kept = [run for run, n in counts.items() if n >= (REPORTS_WITH_WORD if run[0].isalpha() else REPORTS_WITH_GAP)]
        return cls._of(kept)

    @classmethod
    def _of(cls, runs: Iterable[str]) -> Lexicon:
        runs = [*runs]
        return cls(map(_key, runs), (_key(run[:size]) for run in runs for size in range(1, len(run) + 1)))

    def extended(self, texts: Iterable[str]) -> Lexicon:
        """The same lexicon with the words of some texts as well, in their own spelling."""
        words = {run for text in texts for run in _RUN.findall(text) if run[0].isalpha()} - _HEADINGS
        more = Lexicon._of(words)
        return Lexicon(self._whole | more._whole, self._begun | more._begun)

    def knows(self, text: str) -> bool:
        """Whether every word of a text is known; gaps are not looked at."""
        return all(_key(run) in self._whole for run in _RUN.findall(text) if run[0].isalpha())

    def follow(self, run: str, text: str) -> str | None:
        """What is begun after ``text`` was added behind the begun run ``run``; ``None`` where that leaves the lexicon.

        Every run but the last must be known; the last must begin one that is.
        """
        runs = _RUN.findall(run + text)
        if not all(_key(one) in self._whole for one in runs[:-1]) or (runs and _key(runs[-1]) not in self._begun):
            return None
        return runs[-1] if runs else ""

    def complete(self, run: str) -> bool:
        """Whether a begun run is a whole word or gap."""
        return not run or _key(run) in self._whole

    def save(self, path: Path) -> None:
        """Write one uint32 array: a hash each, its lowest bit set where it is one of a whole word or gap."""
        keys = np.array(sorted(key | (key in self._whole) for key in self._begun), "<u4")
        with open(path, "wb") as file:
            np.save(file, keys, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file holds no word list.
        """
        try:
            keys = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile):
            keys = np.empty(0)
        if keys.dtype != np.dtype("<u4") or keys.ndim != 1:
            raise BundleError(f"{path.name} in {path.parent} holds no word list: install or export the bundle again")
        return cls((keys[keys & 1 == 1] & ~np.uint32(1)).tolist(), (keys & ~np.uint32(1)).tolist())


def _key(run: str) -> int:
    return zlib.crc32(run.encode("utf-8", "replace")) & 0xFFFFFFFE
