"""The lexicon: hashes of the words in the training reports, so that a draft contains no invented words.

A subword language model can combine pieces into words that do not exist, in particular with sampling, beam search or a
ban on repetition. So a token may only continue a word of the training reports, or of the texts that come with a study.
Text is split into runs of letters (words) and runs of other characters (gaps: spaces, punctuation, digits). The lexicon
holds 31-bit hashes of both and of all their prefixes. The reports cannot be recovered from it.
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
REPORTS_WITH_WORD = 2  # least number of reports with a word; a word of one report may be a name or a typing error
REPORTS_WITH_GAP = 10


class Lexicon:
    """Known words and gaps.

    Args:
        whole: hashes of the words and gaps.
        prefixes: hashes of all their prefixes, the whole runs included.
    """

    def __init__(self, whole: Iterable[int], prefixes: Iterable[int]):
        self._whole, self._prefixes = frozenset(whole), frozenset(prefixes)

    def __len__(self) -> int:
        return len(self._whole)

    @classmethod
    def compile(cls, reports: Iterable[str]) -> Lexicon:
        """Build a lexicon from reports without headings: words that occur in at least :data:`REPORTS_WITH_WORD`
        reports, gaps in at least :data:`REPORTS_WITH_GAP`."""
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
        """This lexicon with the words of some texts added, in the given spelling."""
        words = {run for text in texts for run in _RUN.findall(text) if run[0].isalpha()} - _HEADINGS
        more = Lexicon._of(words)
        return Lexicon(self._whole | more._whole, self._prefixes | more._prefixes)

    def knows(self, text: str) -> bool:
        """Whether every word of a text is known; gaps are ignored."""
        return all(_key(run) in self._whole for run in _RUN.findall(text) if run[0].isalpha())

    def follow(self, run: str, text: str) -> str | None:
        """The unfinished run after ``text`` is added to the unfinished run ``run``; ``None`` if the lexicon forbids it.

        Every run but the last must be known; the last must be the prefix of a known one.
        """
        runs = _RUN.findall(run + text)
        if not all(_key(one) in self._whole for one in runs[:-1]) or (runs and _key(runs[-1]) not in self._prefixes):
            return None
        return runs[-1] if runs else ""

    def complete(self, run: str) -> bool:
        """Whether a run is a complete word or gap."""
        return not run or _key(run) in self._whole

    def save(self, path: Path) -> None:
        """Write one uint32 array of hashes; the lowest bit is set for complete words and gaps."""
        keys = np.array(sorted(key | (key in self._whole) for key in self._prefixes), "<u4")
        with open(path, "wb") as file:
            np.save(file, keys, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a lexicon.
        """
        try:
            keys = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile):
            keys = np.empty(0)
        if keys.dtype != np.dtype("<u4") or keys.ndim != 1:
            raise BundleError(f"{path.name} in {path.parent} is not a lexicon: install or export the bundle again")
        return cls((keys[keys & 1 == 1] & ~np.uint32(1)).tolist(), (keys & ~np.uint32(1)).tolist())


def _key(run: str) -> int:
    return zlib.crc32(run.encode("utf-8", "replace")) & 0xFFFFFFFE
