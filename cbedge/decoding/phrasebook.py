"""The draft model of lossless speculative decoding: which token followed which in reports.

Report drafts are made of phrases that come again and again. The phrasebook guesses the next few tokens by the longest
run of tokens that it knows, and the language model checks the guesses all at once (:func:`cbedge.decoding.decode`).
A wrong guess costs a little time and never changes a word, which is why keys may collide. It knows training reports,
and best also the model's own drafts of training studies (``python -m export.revise --phrases``): a model says the same
things in far fewer ways than radiologists do.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.errors import BundleError

ORDER = 12
MAX_BYTES = 1_000_000
START = 0xFFFFFFFF  # stands before the first token of a report
_ENTRY = np.dtype([("key", "<u4"), ("token", "<u4")])


class Phrasebook:
    """Guesses how a report goes on.

    Args:
        followers: what followed most often, by the key of a known run of 1 to :data:`ORDER` tokens.
    """

    def __init__(self, followers: Mapping[int, int]):
        self._followers = dict(followers)

    def __len__(self) -> int:
        return len(self._followers)

    @classmethod
    def load(cls, path: Path) -> Phrasebook:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is no phrasebook.
        """
        try:
            entries = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile):
            entries = np.empty(0)
        if entries.dtype != _ENTRY or entries.ndim != 1:
            raise BundleError(f"{path.name} in {path.parent} is no phrasebook: install or export the bundle again")
        return cls(dict(zip(entries["key"].tolist(), entries["token"].tolist(), strict=True)))

    def save(self, path: Path) -> None:
        """Write the phrasebook as one NumPy array."""
        entries = np.array(sorted(self._followers.items()), _ENTRY)
        with open(path, "wb") as file:
            np.save(file, entries, allow_pickle=False)

    @classmethod
    def compile(cls, reports: Iterable[Sequence[int]], max_bytes: int = MAX_BYTES) -> Phrasebook:
        """Learn from reports, each as token ids with the stop token.

        A run is kept where it was met at least twice and says something else than the same run less its first token;
        where that is more than ``max_bytes``, the most frequent are kept.
        """
        followers: dict[tuple[int, ...], Counter[int]] = {}
        for report in reports:
            row = [START, *report]
            for end in range(1, len(row)):
                for size in range(1, min(ORDER, end) + 1):
                    followers.setdefault(tuple(row[end - size : end]), Counter())[row[end]] += 1
        best = {run: counts.most_common(1)[0] for run, counts in followers.items() if counts.total() > 1}
        kept = [
            (count, run, token) for run, (token, count) in best.items()
            if count > 1 and (len(run) == 1 or best[run[1:]][0] != token)
        ]  # fmt: skip
        kept.sort(key=lambda entry: (-entry[0], entry[1]))
        entries: dict[int, int] = {}
        for _, run, token in kept[: (max_bytes - 256) // _ENTRY.itemsize]:
            entries.setdefault(_key(run), token)  # the more frequent of two runs with one key stays
        return cls(entries)

    def guess(self, written: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow what is written; fewer, or none, where no run is known."""
        recent = [START, *written][-ORDER:] if len(written) < ORDER else list(written[-ORDER:])
        guesses: list[int] = []
        while len(guesses) < count:
            token = self._next(recent)
            if token is None:
                break
            guesses.append(token)
            recent = [*recent, token][-ORDER:]
        return guesses

    def _next(self, recent: list[int]) -> int | None:
        keys = (_key(recent[start:]) for start in range(len(recent)))
        return next((self._followers[key] for key in keys if key in self._followers), None)


def _key(run: Sequence[int]) -> int:
    return zlib.crc32(array("I", run).tobytes())
