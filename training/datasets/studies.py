"""Records of a collection as they are on disk, and studies for training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cbedge.errors import ContextError
from cbedge.prompt import ClinicalContext, build_target
from training.findings import read_tags
from training.ontology import TAGS

SPLITS = ("train", "val", "test", "extra")

_DERIVED: dict[str, tuple[int, ...]] = {}  # target → tags, because a run opens its collection several times
_MARK = re.compile(r"X{3,}|_{2,}")
_SENTENCE = re.compile(r"(?<=[.?!])(?<!\bDr\.)\s+")


@dataclass(frozen=True)
class View:
    """One image of a study: its file, and ``frontal``, ``lateral`` or ``None`` (unknown)."""

    file: Path
    view: str | None


@dataclass(frozen=True)
class Record:
    """One study of a collection, unchanged.

    Attributes:
        split: ``train``, ``val``, ``test`` or ``extra``.
        indication, comparison, findings, impression: as written, with de-identification marks.
        tags: 1 (present), 0 (absent) or -1 (unknown) for each of :data:`~training.ontology.TAGS`.
        place: file and line, if the collection has one file of studies.
        patient: identifier of the patient in the collection, if any.
        missing: images that are not on disk.
        tags_given: whether the collection has tags; otherwise they are derived from the report.
    """

    study_id: str
    split: str
    images: tuple[View, ...]
    indication: str | None = None
    comparison: str | None = None
    findings: str | None = None
    impression: str | None = None
    tags: tuple[int, ...] = (-1,) * len(TAGS)
    place: str = ""
    patient: str | None = None
    missing: tuple[Path, ...] = ()
    tags_given: bool = True


@dataclass(frozen=True)
class Study:
    """One study with a frontal radiograph.

    Attributes:
        split: ``train``, ``val``, ``test`` or ``extra``.
        image: path of the frontal radiograph.
        lateral: path of the lateral radiograph, or ``None``.
        context: indication, comparison and view, cleaned as in inference.
        target: the training target, ``FINDINGS: … IMPRESSION: …``; may be empty.
        findings: the findings as written, with marks; the reference in evaluation.
        tags: 1, 0 or -1 (unknown) for each of :data:`~training.ontology.TAGS`.
        tags_given: whether the collection has tags.
        tags_derived: whether the tags were derived from the report.
    """

    study_id: str
    split: str
    image: Path
    context: ClinicalContext
    target: str
    findings: str
    impression: str
    tags: tuple[int, ...]
    lateral: Path | None = None
    tags_given: bool = True
    tags_derived: bool = False

    @property
    def abnormal(self) -> bool:
        """Whether the study is known to be abnormal."""
        return self.tags[0] == 1


@dataclass
class Tally:
    """Counts of what was found and of what was dropped in a collection, and notes about assumptions."""

    found: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def studies_of(records: Iterator[Record], splits: tuple[str, ...], tally: Tally | None = None) -> Iterator[Study]:
    """The records of some splits as studies; those without a frontal radiograph are dropped and counted."""
    tally = tally or Tally()
    for record in records:
        if record.split not in splits:
            continue
        frontal = next((image.file for image in record.images if image.view == "frontal"), None)
        if frontal is None:
            unknown = any(image.view is None for image in record.images)
            reason = "no image of known frontal view" if unknown else "no frontal radiograph on disk"
            tally.dropped[f"study: {reason}"] += 1
            continue
        study = make_study(record, frontal)
        if not study.target:
            tally.dropped["report: no usable text (study kept for its image)"] += 1
        yield study


def make_study(record: Record, image: Path) -> Study:
    """A record as a study with the frontal radiograph ``image`` and the first lateral one."""
    return Study(
        study_id=record.study_id,
        split=record.split,
        image=image,
        context=ClinicalContext(
            _context("indication", record.indication), _context("comparison", record.comparison), "frontal"
        ),
        target=build_target(clean_report(record.findings), clean_report(record.impression)),
        findings=record.findings or "",
        impression=record.impression or "",
        tags=record.tags,
        lateral=next((view.file for view in record.images if view.view == "lateral"), None),
        tags_given=record.tags_given,
    )


def derive_tags(studies: Iterable[Study]) -> list[Study]:
    """The studies; those without given tags get the tags that their report names (:mod:`training.findings`).

    A tag that a report does not name is 0. A study without a report keeps unknown tags.
    """
    listed = list(studies)
    rows = [i for i, study in enumerate(listed) if not study.tags_given and study.target]
    if rows:
        new = dict.fromkeys(listed[i].target for i in rows if listed[i].target not in _DERIVED)
        _DERIVED.update(zip(new, (tuple(map(int, row)) for row in read_tags(list(new))), strict=True))
    for i in rows:
        listed[i] = replace(listed[i], tags=_DERIVED[listed[i].target], tags_derived=True)
    return listed


def clean_report(text: str | None) -> str | None:
    """Remove de-identification marks from a report section, because the model must never write one.

    The marks are IU X-RAY's ``XXXX`` and MIMIC-CXR's ``___``. ``x-XXXX`` is the word x-ray and is restored. Any other
    sentence with a mark is dropped, because the rest misleads ("no XXXX of a pleural effusion"). ``None`` if no
    sentence is left.
    """
    text = re.sub(r"\b([Xx])-XXXX", r"\1-ray", text or "")
    sentences = [s for s in _SENTENCE.split(re.sub(r"\s+", " ", text).strip()) if s and not _MARK.search(s)]
    kept = [s for s in sentences if re.search(r"[A-Za-z]{2}", s)]
    return " ".join(kept) or None


def _context(name: str, text: str | None) -> str | None:
    try:
        return getattr(ClinicalContext(**{name: text}), name)
    except ContextError:  # only marks, or too long for an indication
        return None
