"""Collections of radiographs and reports: one door for all of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from training.datasets import iu_xray, mimic_cxr
from training.datasets.provenance import Provenance, read_dataset_json, unnamed
from training.datasets.studies import Record, Study, Tally, studies_of
from training.fetch import DEFAULT_CACHE

INDEX_CACHE = DEFAULT_CACHE.parent / "index"


def open_studies(
    folder: Path, splits: tuple[str, ...], limit: int | None = None, cache: Path = INDEX_CACHE
) -> Sequence[Study]:
    """The studies of some splits that have a frontal radiograph and a report to learn, of whatever collection it is.

    Args:
        folder: IU X-RAY in any of its layouts, or MIMIC-CXR-JPG.
        splits: of ``train``, ``val``, ``test``, ``extra``.
        limit: only the first so many.
        cache: where the index of a large collection is kept.

    Raises:
        FileNotFoundError: the folder holds no known collection.
        ValueError: a file of it is damaged.
    """
    if mimic_cxr.is_mimic_cxr(folder):
        index = mimic_cxr.index_path(folder, cache)
        mimic_cxr.build_index(folder, index)
        studies = mimic_cxr.IndexedStudies(index, folder, splits)
        return studies if limit is None else studies[:limit]
    return [s for s in iu_xray.read_studies(folder, splits) if s.target][:limit]


def find_provenance(folder: Path) -> Provenance:
    """Where the data in a folder come from: ``dataset.json``, else a recognised collection's own, else unnamed.

    Raises:
        ValueError: ``dataset.json`` or a file of the collection is damaged.
    """
    given = read_dataset_json(folder)
    if given is not None:
        return given
    for collection, is_there in ((mimic_cxr, mimic_cxr.is_mimic_cxr), (iu_xray, iu_xray.is_iu_xray)):
        if is_there(Path(folder)):
            return collection.PROVENANCE if collection.is_recognised(Path(folder)) else unnamed(folder)
    return unnamed(folder)


def open_records(folder: Path, tally: Tally, cache: Path = INDEX_CACHE) -> tuple[str, Iterator[Record]]:
    """The collection's name and its records; ``tally`` is complete once they are exhausted.

    Raises:
        FileNotFoundError: the folder holds no known collection.
        ValueError: a file of it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if mimic_cxr.is_mimic_cxr(folder):
        index = mimic_cxr.index_path(folder, cache)
        mimic_cxr.build_index(folder, index, tally)
        return find_provenance(folder).name, mimic_cxr.records(index, folder)
    if iu_xray.is_iu_xray(folder):
        return find_provenance(folder).name, iu_xray.records(folder, tally)
    raise FileNotFoundError(
        f"no known collection in {folder}: give IU X-RAY (studies.jsonl, indiana_reports.csv, annotation.json or XML "
        "reports) or MIMIC-CXR-JPG (mimic-cxr-2.0.0-split.csv.gz and its neighbours)"
    )


__all__ = [
    "INDEX_CACHE",
    "Provenance",
    "Record",
    "Study",
    "Tally",
    "find_provenance",
    "open_records",
    "open_studies",
    "studies_of",
]
