"""The IU X-RAY collection (Open-i): studies with radiographs, indication, findings, impression and curated tags.

Demner-Fushman et al., J Am Med Inform Assoc 2016;23(2):304-310. CC BY-NC-ND 4.0: never copied into this repository.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cbedge.errors import ContextError
from cbedge.prompt import ClinicalContext, build_target

# A tag is positive when any of its words starts one of a study's curated problems.
TAGS: dict[str, tuple[str, ...]] = {
    "abnormal": (),  # anything but "normal"; set apart in study_tags
    "cardiomegaly": ("cardiomegaly", "cardiac shadow"),
    "effusion": ("pleural effusion", "costophrenic angle"),
    "atelectasis": ("pulmonary atelectasis", "atelectasis"),
    "opacity": ("opacity", "consolidation", "airspace disease", "pneumonia", "infiltrate", "density"),
    "nodule": ("nodule", "mass", "lung neoplasms"),
    "calcification": ("calcified granuloma", "calcinosis", "granuloma", "granulomatous disease"),
    "hyperinflation": ("lung/hyperdistention", "pulmonary emphysema", "emphysema", "pulmonary disease, chronic",
                       "diaphragm", "hyperdistention"),
    "low volume": ("lung/hypoinflation", "hypoinflation"),
    "spine": ("thoracic vertebrae", "spine", "scoliosis", "kyphosis", "spondylosis", "osteophyte"),
    "aorta": ("aorta", "atherosclerosis"),
    "scar": ("cicatrix", "pulmonary fibrosis", "thickening", "markings"),
    "device": ("medical device", "catheters", "surgical instruments", "implanted medical device", "tube", "stents",
               "sternotomy"),
    "congestion": ("pulmonary congestion", "pulmonary edema", "heart failure", "pulmonary vascular congestion"),
    "fracture": ("fractures, bone", "fracture", "deformity"),
    "hernia": ("hernia, hiatal", "hernia"),
    "pneumothorax": ("pneumothorax", "hydropneumothorax"),
}  # fmt: skip

_MARK = re.compile(r"X{3,}")
_SENTENCE = re.compile(r"(?<=[.?!])(?<!\bDr\.)\s+")


@dataclass(frozen=True)
class Study:
    """One study with a frontal radiograph.

    Attributes:
        study_id: Open-i's name.
        split: ``train``, ``val``, ``test`` (R2Gen's) or ``extra``.
        image: path of the frontal radiograph.
        context: indication, comparison and view, cleaned as at inference.
        target: ``FINDINGS: … IMPRESSION: …`` to be learnt, empty where nothing is left of the report.
        findings: the findings as written, marks included: the reference of the evaluation.
        tags: one 0/1 for each of :data:`TAGS`.
    """

    study_id: str
    split: str
    image: Path
    context: ClinicalContext
    target: str
    findings: str
    tags: tuple[int, ...]


def read_studies(folder: Path, splits: tuple[str, ...]) -> list[Study]:
    """Read the studies of some splits from ``studies.jsonl``; those without a frontal radiograph are left out.

    Raises:
        FileNotFoundError: the folder holds no ``studies.jsonl``.
    """
    path = Path(folder) / "studies.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no studies.jsonl in {folder}: give the folder of the IU X-RAY data")
    studies = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            frontal = [image for image in record["images"] if image["view"] == "frontal"]
            if record["split"] in splits and frontal:
                studies.append(_study(record, Path(folder) / "images" / frontal[0]["file"]))
    return studies


def _study(record: dict, image: Path) -> Study:
    return Study(
        study_id=record["study_id"],
        split=record["split"],
        image=image,
        context=_context(record),
        target=build_target(clean_report(record["findings"]), clean_report(record["impression"])),
        findings=record["findings"] or "",
        tags=study_tags(record["problems"] + record["mesh_major"] + record["mesh_automatic"]),
    )


def _context(record: dict) -> ClinicalContext:
    fields = {}
    for name in ("indication", "comparison"):
        try:
            fields[name] = ClinicalContext(**{name: record[name]}).__getattribute__(name)
        except ContextError:  # nothing but marks
            fields[name] = None
    return ClinicalContext(**fields, view="frontal")


def clean_report(text: str | None) -> str | None:
    """Make a report section fit to be learnt: the model must never print a de-identification mark.

    ``x-XXXX`` is the word x-ray and is restored. Any other sentence that holds a mark is dropped whole, since what is
    left of it misleads ("no XXXX of a pleural effusion"). ``None`` where nothing is left.
    """
    text = re.sub(r"\b([Xx])-XXXX", r"\1-ray", text or "")
    sentences = [s for s in _SENTENCE.split(re.sub(r"\s+", " ", text).strip()) if s and not _MARK.search(s)]
    kept = [s for s in sentences if re.search(r"[A-Za-z]{2}", s)]
    return " ".join(kept) or None


def study_tags(problems: list[str]) -> tuple[int, ...]:
    """The curated problems of a study as one 0/1 for each of :data:`TAGS`."""
    names = [problem.lower() for problem in problems]
    flags = [int(any(n.startswith(words) for n in names)) if words else 0 for words in TAGS.values()]
    others = ("normal", "no indexing", "technical quality of image unsatisfactory")
    flags[0] = int(any(not n.startswith(others) for n in names))
    return tuple(flags)


def clean_reference(report: str) -> str:
    """R2Gen's cleaning of an IU X-RAY report (Chen et al., EMNLP 2020), by which the field's scores are computed.

    Runs of full stops are folded, list numbers dropped, text lowered, and everything but words, digits and the full
    stop between sentences removed.
    """
    text = re.sub(r"\.{2,}", ".", report.replace("..", "."))
    text = re.sub(r"(^|\. | )\d\. ", r"\1", text)
    sentences = []
    for sentence in text.strip().lower().split(". "):
        sentence = re.sub(r"[.,?;*!%^&_+():\-\[\]{}]", "", sentence.replace('"', "").replace("/", ""))
        sentence = sentence.replace("\\", "").replace("'", "").strip()
        if sentence:
            sentences.append(re.sub(r"\s+", " ", sentence))
    return " . ".join(sentences) + " ." if sentences else ""
