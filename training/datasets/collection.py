"""What a collection of radiographs and reports offers."""

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
        files: the files by which a folder of it is known, for messages.
        provenance: of the collection as released.
        is_in: whether a folder holds it.
        is_recognised: whether what a folder holds is the release itself, not other data in its layout.
        studies: folder, splits, limit and cache folder → the studies that have a frontal radiograph and a report.
        records: folder, tally and cache folder → all its records; the tally is complete once they are exhausted.
    """

    files: str
    provenance: Provenance
    is_in: Callable[[Path], bool]
    is_recognised: Callable[[Path], bool]
    studies: Callable[[Path, tuple[str, ...], int | None, Path], Sequence[Study]]
    records: Callable[[Path, Tally, Path], Iterator[Record]]
