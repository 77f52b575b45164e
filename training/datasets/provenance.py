"""Provenance of training data, for the model card.

A folder may have ``dataset.json`` with ``name`` and optional ``licence``, ``source``, ``citation``, ``detail`` and
``population``. Known collections are recognized by their content, not by file names. All other data are unnamed;
nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.datasets.studies import SPLITS, Study

DATASET = "dataset.json"
TRAINING_DATA = "training_data.json"  # in a run's folder and in a checkpoint's
NO_LICENCE = "not stated"


@dataclass(frozen=True)
class Provenance:
    """Provenance of a collection; all texts except the name may be empty.

    Attributes:
        source: source of the data, such as an address or a department.
        detail: the part of the collection that is used.
        population: the patients, for the limitations in the model card.
    """

    name: str
    licence: str = NO_LICENCE
    source: str = ""
    citation: str = ""
    detail: str = ""
    population: str = ""


def unnamed(folder: Path) -> Provenance:
    """The provenance of unknown data, named after their folder."""
    return Provenance(f"unnamed data at {Path(folder).resolve().name}")


def read_dataset_json(folder: Path) -> Provenance | None:
    """Read ``dataset.json`` of a folder; ``None`` if there is none.

    Raises:
        ValueError: the file is not a JSON object with these strings, or has no name.
    """
    path = Path(folder) / DATASET
    if not path.is_file():
        return None
    known = Provenance.__dataclass_fields__
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({type(error).__name__}): correct it, or remove it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: give name, licence, source and citation")
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be a string: put it in quotes")
    if not values.get("name", "").strip():
        raise ValueError(f"{path} has no name: give the name of the collection")
    given = {key: " ".join(value.split()) for key, value in values.items()}
    return Provenance(**{key: value for key, value in given.items() if value})


def data_record(provenance: Provenance, studies: Iterable[Study]) -> dict[str, str]:
    """The record of a run's data, for manifest and model card.

    Returns:
        The texts of :class:`Provenance`; ``splits``; ``studies``, their number; ``study_list_sha256`` of the sorted
        lines ``SPLIT STUDY_ID``; and ``tags``: ``given``, or how many were derived from report text.
    """
    counts: Counter[str] = Counter()
    lines, derived = [], 0
    for study in studies:
        counts[study.split] += 1
        derived += study.tags_derived
        lines.append(f"{study.split} {study.study_id}\n")
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    total = counts.total()
    splits = ", ".join(f"{split} {counts[split]:,}" for split in SPLITS if counts[split])
    tags = f"derived from report text in {derived:,} of {total:,} studies" if derived else "given"
    return {**vars(provenance), "splits": splits, "studies": str(total), "study_list_sha256": digest, "tags": tags}


def save_training_data(records: list[dict[str, str]], folder: Path) -> None:
    """Write records of :func:`data_record` into the folder of a checkpoint or a run."""
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    (Path(folder) / TRAINING_DATA).write_text(text, encoding="utf-8")


def load_training_data(folder: Path) -> list[dict[str, str]] | None:
    """Read what :func:`save_training_data` wrote; ``None`` if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / TRAINING_DATA
    if not path.is_file():
        return None
    try:
        records: Any = json.loads(path.read_text(encoding="utf-8"))
        return [{str(k): str(v) for k, v in record.items()} for record in records]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged: restore it, or give --origin") from None


def merged(records: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The records in their order, without duplicates."""
    return [dict(items) for items in dict.fromkeys(tuple(record.items()) for record in records)]
