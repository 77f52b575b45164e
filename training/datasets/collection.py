"""Interface of a collection of radiographs and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.datasets.provenance import Provenance
from training.datasets.studies import Record, Study, Tally


@dataclass(frozen=True)
class Collection:
    """One collection.

    Attributes:
        files: names of its files, for messages.
        is_in: whether a folder has this collection or other data in its layout.
        is_recognised: whether a folder has the released collection itself.
        studies: folder, splits, limit and cache folder → the studies with a frontal radiograph and a report.
        records: folder, tally and cache folder → all records; the tally is complete once they are exhausted.
    """

    files: str
    provenance: Provenance
    is_in: Callable[[Path], bool]
    is_recognised: Callable[[Path], bool]
    studies: Callable[[Path, tuple[str, ...], int | None, Path], Sequence[Study]]
    records: Callable[[Path, Tally, Path], Iterator[Record]]
