"""Checks before a run writes any file: the data and its splits, and that each loss can learn something.

Each error is one line that names the file and, if possible, the line in it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cbedge.errors import CbedgeError
from cbedge.images.radiograph import load_radiograph
from training.config import RunConfig, Stage
from training.datasets import Study, Tally, find_provenance, mimic_cxr, open_records, open_studies
from training.datasets.provenance import TRAINING_DATA, data_record, load_training_data
from training.datasets.studies import Record
from training.ontology import TAGS
from training.validation import LEAST_POSITIVES

_TRAINED = frozenset({"train", "extra"})


@dataclass
class Checked:
    """The result of the checks.

    Attributes:
        record: the data's record, see :func:`training.datasets.provenance.data_record`.
        stages: the stages, without findings for which no threshold can be chosen.
    """

    record: dict[str, str]
    stages: tuple[Stage, ...]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Counts:
    """The number of studies, and for each tag the number with and without it, int [2, TAGS]."""

    studies: int = 0
    tags: np.ndarray = field(default_factory=lambda: np.zeros((2, len(TAGS)), int))

    def add(self, study: Study) -> None:
        self.studies += 1
        values = np.array(study.tags)
        self.tags += np.stack([values == 1, values == 0])

    @property
    def varies(self) -> np.ndarray:
        """Tags that some studies have and others do not have, bool [TAGS]."""
        return self.tags.min(0) > 0


def check_run(config: RunConfig, processes: int = 1) -> Checked:
    """Check that a run can learn, before a model is loaded or a file is written.

    Raises:
        FileNotFoundError: the folder has no known collection.
        ValueError: a file, a split or a stage cannot be used; the message names it.
    """
    notes = _check_records(config)
    used = dict.fromkeys(split for stage in config.stages for split in stage.splits)
    counts = {split: _Counts() for split in (*used, "val")}
    val = _Counts()

    def counted():  # type: ignore[no-untyped-def]
        for study in open_studies(config.data, tuple(counts)):
            counts[study.split].add(study)
            if study.split == "val" and val.studies < config.validation_studies:
                val.add(study)
            yield study

    record = data_record(find_provenance(config.data), counted())
    found = ", ".join(f"{split} {one.studies:,}" for split, one in counts.items())
    for stage in config.stages:
        if not any(counts[split].studies for split in stage.splits) or not val.studies:
            kind = "training" if val.studies else "validation"
            raise ValueError(
                f"no {kind} study with a frontal radiograph and a report in {config.data} (found: {found}): see python "
                "-m training data check"
            )
    if record["tags"] != "given":
        notes.append(f"Tags are {record['tags']}, because the data have none.")
    stages = tuple(_check_stage(stage, config, counts, val, processes, notes) for stage in config.stages)
    return Checked(record, stages, notes)


def _check_stage(
    stage: Stage, config: RunConfig, counts: dict[str, _Counts], val: _Counts, processes: int, notes: list[str]
) -> Stage:
    where = f"stage {stage.name}"
    train = _Counts()
    for split in dict.fromkeys(stage.splits):
        train.studies += counts[split].studies
        train.tags = train.tags + counts[split].tags
    if not any(stage.losses.values()):
        raise ValueError(f"{where}: every loss has weight 0: nothing can be learned")
    if stage.losses.get("tags") and not train.varies.any():
        raise ValueError(
            f"{where}: the tags loss cannot learn anything: no finding is present in some of the {train.studies:,} "
            "training studies and absent in others"
        )
    if stage.losses.get("contrastive") and min(stage.batch_size * processes, train.studies) < 2:
        raise ValueError(f"{where}: the contrastive loss cannot learn from one study at a time: raise batch_size")
    if stage.select_by == "tags" and not (val.tags[0] >= LEAST_POSITIVES)[val.varies].any():
        raise ValueError(
            f"{where}: select_by tags needs a finding with {LEAST_POSITIVES} positive validation studies and a negative"
        )
    if not stage.tell_findings:
        return stage
    if not val.varies[0]:
        missing = "abnormal" if not val.tags[0, 0] else "normal"
        raise ValueError(
            f"{where}: tell_findings needs a threshold for 'abnormal', but none of the {val.studies:,} validation "
            f"studies is known to be {missing}"
        )
    trains_tags = any("tags" in one.losses for one in config.stages)
    usable = val.varies & (train.varies if trains_tags else True)
    kept = tuple(name for name in stage.tell_findings if usable[TAGS.index(name)])
    left = [name for name in stage.tell_findings if name not in kept]
    if left:
        notes.append(
            f"{where}: the model will not report these findings, because no threshold can be chosen (no positive or "
            f"no negative {'training or ' if trains_tags else ''}validation study): {', '.join(left)}."
        )
    if not kept:
        raise ValueError(f"{where}: none of tell_findings has a positive and a negative validation study")
    return replace(stage, tell_findings=kept)


def _check_records(config: RunConfig) -> list[str]:
    """Check the studies of a collection in the user's own files; returns notes."""
    folder = Path(config.data)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; give the folder of studies.jsonl as --data")
    if mimic_cxr.is_mimic_cxr(folder):  # it has splits by patient, and too many images to read them twice
        return []
    tally = Tally()
    images: dict[Path, str] = {}
    patients: dict[str, Record] = {}
    wanted = {"val", *(split for stage in config.stages for split in stage.splits)}
    used: list[tuple[Path, str]] = []
    empty: list[str] = []
    for record in open_records(folder, tally)[1]:
        place = record.place or f"{folder}, study {record.study_id}"
        if record.missing:
            raise ValueError(f"{place}: image {record.missing[0].name} is missing: add it, or remove it from the line")
        for view in record.images:
            before = images.setdefault(view.file, place)
            if before != place:
                raise ValueError(f"{place}: image {view.file.name} also belongs to {before}: keep it in one study")
        if record.patient is not None:
            other = patients.setdefault(record.patient, record)
            if _side(other.split) != _side(record.split):
                raise ValueError(
                    f"{place}: its patient is in split {record.split}, but in {other.split} in "
                    f"{other.place.rsplit(', ', 1)[-1]}: put all studies of a patient into one split"
                )
        if record.split in wanted:
            used += [(view.file, place) for view in record.images if view.view is not None]
            if not (record.findings or "").strip() and not (record.impression or "").strip():
                empty.append(place)
    if not all(stage.image_blind for stage in config.stages) and not (config.output / TRAINING_DATA).is_file():
        _check_images(used)
    notes = list(tally.notes)
    if empty:
        notes.append(f"{len(empty):,} studies have no report and are left out; the first is {empty[0]}.")
    return notes


def _side(split: str) -> str:
    return "train" if split in _TRAINED else split


def _check_images(files: list[tuple[Path, str]]) -> None:
    """Decode every image once, because an unreadable one would stop the run hours later."""

    def fault(one: tuple[Path, str]) -> str | None:
        try:
            load_radiograph(one[0])
        except CbedgeError as error:
            return f"{one[1]}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        for message in pool.map(fault, files):
            if message is not None:
                pool.shutdown(cancel_futures=True)
                raise ValueError(message)


def earlier_records(config: RunConfig) -> list[dict[str, str]]:
    """The records of the training data of the base model and of the run so far."""
    places = [config.output] + ([Path(config.base)] if Path(config.base).is_dir() else [])
    return [record for place in reversed(places) for record in load_training_data(place) or []]
