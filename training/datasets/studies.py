"""What every collection is read into: records as they are on disk, and studies that a model can learn from."""

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

# What the tag head learns, in order. A collection says of each 1 (present), 0 (absent) or -1 (not known).
SPLITS = ("train", "val", "test", "extra")

_DERIVED: dict[str, tuple[int, ...]] = {}  # target → tags: a collection is opened several times in a run
_MARK = re.compile(r"X{3,}|_{2,}")
_SENTENCE = re.compile(r"(?<=[.?!])(?<!\bDr\.)\s+")


@dataclass(frozen=True)
class View:
    """One image of a study: its file, and ``frontal``, ``lateral`` or ``None`` where nobody says."""

    file: Path
    view: str | None


@dataclass(frozen=True)
class Record:
    """One study as its collection ships it.

    Attributes:
        study_id: the collection's name for it.
        split: ``train``, ``val``, ``test`` or ``extra``.
        images: those that are on disk.
        indication, comparison, findings, impression: as written, de-identification marks included.
        tags: 1, 0 or -1 for each of :data:`TAGS`.
        place: file and line, where the collection has one file of studies.
        patient: the collection's name for the patient, where it has one.
        missing: images that are named and not on disk.
        tags_given: whether the collection says anything about tags; where not, they are read from the report.
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
        study_id: the collection's name for it.
        split: ``train``, ``val``, ``test`` or ``extra``.
        image: path of the frontal radiograph.
        lateral: path of the lateral radiograph, where the study has one.
        context: indication, comparison and view, cleaned as at inference.
        target: ``FINDINGS: … IMPRESSION: …`` to be learnt, empty where nothing is left of the report.
        findings: the findings as written, marks included: the reference of the evaluation.
        impression: as written.
        tags: 1, 0 or -1 (not known) for each of :data:`TAGS`.
        tags_given: ``False`` where the collection says nothing about tags.
        tags_derived: the tags were read from the report.
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
    """What reading a collection met: counts of what was found, of what was dropped and why, and assumptions made."""

    found: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def studies_of(records: Iterator[Record], splits: tuple[str, ...], tally: Tally | None = None) -> Iterator[Study]:
    """The records of some splits as studies; one without a frontal radiograph is dropped and counted."""
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
            tally.dropped["report: nothing left to learn from (study kept for its image)"] += 1
        yield study


def make_study(record: Record, image: Path) -> Study:
    """One record as a study whose frontal radiograph is ``image``; the first lateral one joins it."""
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
    """The studies; those of which no tag is given get the tags that their report names.

    :mod:`training.findings` reads the reports. A tag that a report does not name is 0. A study without a report keeps
    unknown tags.
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
    """Make a report section fit to be learnt: the model must never print a de-identification mark.

    The marks are IU X-RAY's ``XXXX`` and MIMIC-CXR's ``___``. ``x-XXXX`` is the word x-ray and is restored. Any other
    sentence that holds a mark is dropped whole, since what is left of it misleads ("no XXXX of a pleural effusion").
    ``None`` where nothing is left.
    """
    text = re.sub(r"\b([Xx])-XXXX", r"\1-ray", text or "")
    sentences = [s for s in _SENTENCE.split(re.sub(r"\s+", " ", text).strip()) if s and not _MARK.search(s)]
    kept = [s for s in sentences if re.search(r"[A-Za-z]{2}", s)]
    return " ".join(kept) or None


def _context(name: str, text: str | None) -> str | None:
    try:
        return getattr(ClinicalContext(**{name: text}), name)
    except ContextError:  # nothing but marks, or longer than any indication is
        return None
