"""Collections of radiographs and reports, one entry each.

A new one is a module that makes a :class:`~training.datasets.collection.Collection`, and an entry in
:data:`COLLECTIONS`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from training.datasets.collection import Collection
from training.datasets.iu_xray import IU_XRAY
from training.datasets.mimic_cxr import MIMIC_CXR
from training.datasets.provenance import Provenance, read_dataset_json, unnamed
from training.datasets.studies import Record, Study, Tally
from training.fetch import DEFAULT_CACHE

INDEX_CACHE = DEFAULT_CACHE.parent / "index"
COLLECTIONS: list[Collection] = [MIMIC_CXR, IU_XRAY]


def find_collection(folder: Path) -> Collection:
    """The collection in a folder.

    Raises:
        FileNotFoundError: there is no such folder, or it has no known collection.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    for collection in COLLECTIONS:
        if collection.is_in(folder):
            return collection
    known = " or ".join(f"{collection.provenance.name} ({collection.files})" for collection in COLLECTIONS)
    raise FileNotFoundError(f"no known collection in {folder}: give {known}")


def open_studies(
    folder: Path, splits: tuple[str, ...], limit: int | None = None, cache: Path = INDEX_CACHE
) -> Sequence[Study]:
    """The studies of some splits with a frontal radiograph and a usable report.

    Args:
        folder: folder of one of :data:`COLLECTIONS`.
        splits: of ``train``, ``val``, ``test``, ``extra``.
        cache: cache folder for the index of a large collection.

    Raises:
        FileNotFoundError: the folder has no known collection.
        ValueError: a file is damaged.
    """
    return find_collection(folder).studies(Path(folder), splits, limit, cache)


def find_provenance(folder: Path) -> Provenance:
    """The provenance of the data in a folder: from ``dataset.json``, else of a recognized collection, else unnamed.

    Raises:
        ValueError: ``dataset.json`` or a file of the collection is damaged.
    """
    given = read_dataset_json(folder)
    if given is not None:
        return given
    collection = next((one for one in COLLECTIONS if one.is_in(Path(folder))), None)
    if collection is not None and collection.is_recognised(Path(folder)):
        return collection.provenance
    return unnamed(folder)


def open_records(folder: Path, tally: Tally, cache: Path = INDEX_CACHE) -> tuple[str, Iterator[Record]]:
    """The collection's name and its records; ``tally`` is complete once they are exhausted.

    Raises:
        FileNotFoundError: the folder has no known collection.
        ValueError: a file is damaged.
    """
    collection = find_collection(folder)
    return find_provenance(folder).name, collection.records(Path(folder), tally, cache)
