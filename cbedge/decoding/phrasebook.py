"""The phrasebook: an n-gram draft model for lossless speculative decoding.

Reports consist of recurring phrases. The phrasebook guesses the next few tokens from the longest known n-gram, and the
language model verifies all guesses in one pass (:func:`cbedge.decoding.decode`). A wrong guess costs a little time and
never changes the text, so hash collisions are harmless. It is built from training reports, and preferably also from
the model's own drafts of training studies (``python -m export.revise --phrases``), because a model's wording varies far
less than that of radiologists.
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
START = 0xFFFFFFFF  # precedes the first token of a report
_ENTRY = np.dtype([("key", "<u4"), ("token", "<u4")])


class Phrasebook:
    """Guesses the continuation of a report.

    Args:
        followers: the most frequent next token, by the key of an n-gram of 1 to :data:`ORDER` tokens.
    """

    def __init__(self, followers: Mapping[int, int]):
        self._followers = dict(followers)

    def __len__(self) -> int:
        return len(self._followers)

    @classmethod
    def load(cls, path: Path) -> Phrasebook:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a phrasebook.
        """
        try:
            entries = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile):
            entries = np.empty(0)
        if entries.dtype != _ENTRY or entries.ndim != 1:
            raise BundleError(f"{path.name} in {path.parent} is not a phrasebook: install or export the bundle again")
        return cls(dict(zip(entries["key"].tolist(), entries["token"].tolist(), strict=True)))

    def save(self, path: Path) -> None:
        """Write the phrasebook as one NumPy array."""
        entries = np.array(sorted(self._followers.items()), _ENTRY)
        with open(path, "wb") as file:
            np.save(file, entries, allow_pickle=False)

    @classmethod
    def compile(cls, reports: Iterable[Sequence[int]], max_bytes: int = MAX_BYTES) -> Phrasebook:
        """Build a phrasebook from reports, each as token ids with the stop token.

        An n-gram is kept if it occurs at least twice and predicts another token than the n-gram without its first
        token. If these need more than ``max_bytes``, the most frequent are kept.
        """
        followers: dict[tuple[int, ...], Counter[int]] = {}
        for report in reports:
            row = [START, *report]
            for end in range(1, len(row)):
                for size in range(1, min(ORDER, end) + 1):
                    followers.setdefault(tuple(row[end - size : end]), Counter())[row[end]] += 1
        best = {run: counts.most_common(1)[0] for run, counts in followers.items() if counts.total() > 1}
        kept = [
            (count, run, token)
            for run, (token, count) in best.items()
            if count > 1 and (len(run) == 1 or best[run[1:]][0] != token)
        ]
        kept.sort(key=lambda entry: (-entry[0], entry[1]))
        entries: dict[int, int] = {}
        for _, run, token in kept[: (max_bytes - 256) // _ENTRY.itemsize]:
            entries.setdefault(_key(run), token)  # the more frequent of two runs with one key stays
        return cls(entries)

    def guess(self, written: Sequence[int], count: int) -> list[int]:
        """Guess up to ``count`` next tokens; fewer, or none, if no n-gram is known."""
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
