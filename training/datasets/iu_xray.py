"""The IU X-RAY collection (Open-i), in each of the layouts that people have it in.

Demner-Fushman et al., J Am Med Inform Assoc 2016;23(2):304-310. CC BY-NC-ND 4.0: never copied into this repository.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from training.datasets.studies import SPLITS, TAGS, Record, Study, Tally, View, studies_of

# A tag is positive when any of its words starts one of a study's curated problems.
PROBLEMS: dict[str, tuple[str, ...]] = {
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
PROJECTIONS = "indiana_projections.csv"
ANNOTATION = "annotation.json"


def is_iu_xray(folder: Path) -> bool:
    """Whether a folder holds IU X-RAY in a layout that is known here."""
    return _layout(Path(folder)) is not None


def read_studies(folder: Path, splits: tuple[str, ...]) -> list[Study]:
    """Read the studies of some splits; those without a frontal radiograph are left out.

    Raises:
        FileNotFoundError: the folder holds none of the known layouts.
    """
    return list(studies_of(records(folder), splits))


def records(folder: Path, tally: Tally | None = None) -> Iterator[Record]:
    """The collection's studies, in any of four layouts, told by what is in the folder:

    - ``studies.jsonl`` and ``images/``: one study a line (``study_id``, ``split``, ``images`` with ``file`` and
      ``view``, ``indication``, ``comparison``, ``findings``, ``impression``, ``problems``, ``mesh_major``,
      ``mesh_automatic``);
    - ``indiana_reports.csv`` and ``indiana_projections.csv`` (Kaggle), with ``images/images_normalized/`` or the PNGs
      anywhere below;
    - ``annotation.json`` (R2Gen) and ``images/``: findings only, no indication, no tags; image 0 is taken as frontal;
    - the Open-i release: XML reports and PNGs anywhere below. Its reports do not say the view of an image: put Kaggle's
      ``indiana_projections.csv`` beside them.

    The last two have no word about R2Gen's splits unless its ``annotation.json`` lies beside them; else a hash of the
    study's name deals 70% to train, 10% to val and 20% to test, and figures do not compare with published ones.

    Raises:
        FileNotFoundError: the folder holds none of these.
        ValueError: a file is damaged; the message names it.
    """
    reader = _layout(Path(folder))
    if reader is None:
        raise FileNotFoundError(
            f"no IU X-RAY data in {folder}: it has no studies.jsonl, indiana_reports.csv, annotation.json or XML "
            "reports"
        )
    yield from reader(Path(folder), tally or Tally())


def _layout(folder: Path) -> Callable[[Path, Tally], Iterator[Record]] | None:
    if (folder / "studies.jsonl").is_file():
        return _jsonl
    if (folder / "indiana_reports.csv").is_file():
        return _kaggle
    if next(folder.rglob("*.xml"), None) is not None:
        return _open_i
    if (folder / ANNOTATION).is_file():
        return _r2gen
    return None


def _jsonl(folder: Path, tally: Tally) -> Iterator[Record]:
    path = folder / "studies.jsonl"
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                images = [View(folder / "images" / image["file"], image["view"]) for image in row["images"]]
                record = Record(
                    row["study_id"], row["split"], _present(images, tally), row["indication"], row["comparison"],
                    row["findings"], row["impression"],
                    study_tags(row["problems"] + row["mesh_major"] + row["mesh_automatic"]),
                )  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is not a study ({type(error).__name__}: {error})") from None
            if record.split not in SPLITS:
                raise ValueError(f"{path}, line {number}: unknown split {record.split!r}; known: {', '.join(SPLITS)}")
            tally.found["study"] += 1
            yield record


def _kaggle(folder: Path, tally: Tally) -> Iterator[Record]:
    views = _projections(folder)
    if not views:
        raise FileNotFoundError(f"no {PROJECTIONS} in {folder}: it belongs to indiana_reports.csv and names the images")
    by_study: dict[str, list[str]] = {}
    for name in views:
        by_study.setdefault(name.split("_")[0], []).append(name)
    files, split = _png_files(folder), _splits(folder, tally)
    for row in _rows(folder / "indiana_reports.csv"):
        images = [View(files.get(name, folder / name), views[name]) for name in by_study.get(row["uid"], ())]
        problems = [p.strip() for p in (row["Problems"] + ";" + row["MeSH"]).split(";") if p.strip()]
        tally.found["study"] += 1
        yield Record(
            f"CXR{row['uid']}", split(f"CXR{row['uid']}"), _present(images, tally), row["indication"] or None,
            row["comparison"] or None, row["findings"] or None, row["impression"] or None, study_tags(problems),
        )  # fmt: skip


def _open_i(folder: Path, tally: Tally) -> Iterator[Record]:
    views, files, split = _projections(folder), _png_files(folder), _splits(folder, tally)
    if not views:
        tally.notes.append(
            f"The reports do not say which image is frontal: put Kaggle's {PROJECTIONS} into {folder.name}/."
        )
    for path in sorted(folder.rglob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path} is not valid XML ({error}): fetch it again") from None
        name = root.find("uId")
        if name is None:
            tally.dropped["file: XML that is no report"] += 1
            continue
        text = {a.get("Label", ""): (a.text or "").strip() for a in root.iter("AbstractText")}
        images = []
        for image in (node.get("id", "") for node in root.iter("parentImage")):
            kaggle = f"{image.removeprefix('CXR')}.dcm.png"
            images.append(View(files.get(f"{image}.png", folder / image), views.get(kaggle)))
        problems = [node.text or "" for tag in ("major", "automatic") for node in root.iter(tag)]
        tally.found["study"] += 1
        yield Record(
            name.get("id", ""), split(name.get("id", "")), _present(images, tally), text.get("INDICATION") or None,
            text.get("COMPARISON") or None, text.get("FINDINGS") or None, text.get("IMPRESSION") or None,
            study_tags(problems),
        )  # fmt: skip


def _r2gen(folder: Path, tally: Tally) -> Iterator[Record]:
    tally.notes.append("R2Gen's annotation.json has findings alone: no indication, comparison, impression or tags.")
    tally.notes.append("Image 0 of a study is taken as frontal, image 1 as lateral.")
    for split, rows in _annotation(folder).items():
        for row in rows:
            images = [
                View(folder / "images" / file, "frontal" if number == 0 else "lateral")
                for number, file in enumerate(row["image_path"])
            ]
            tally.found["study"] += 1
            yield Record(row["id"], split, _present(images, tally), findings=row["report"] or None)


def _annotation(folder: Path) -> dict[str, list[dict]]:
    path = folder / ANNOTATION
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "val", "test"):
            for row in values[split]:
                _ = row["id"], row["report"], row["image_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not R2Gen's annotation ({type(error).__name__}: {error})") from None
    return values


def _splits(folder: Path, tally: Tally) -> Callable[[str], str]:
    if (folder / ANNOTATION).is_file():
        known = {row["id"].split("_")[0]: split for split, rows in _annotation(folder).items() for row in rows}
        return lambda study_id: known.get(study_id, "extra")
    tally.notes.append(
        f"No {ANNOTATION} (R2Gen's splits): studies are dealt 70/10/20 by a hash of their name, and scores do not "
        "compare with published ones."
    )
    return hashed_split


def hashed_split(study_id: str) -> str:
    """Deal a study to ``train`` (70%), ``val`` (10%) or ``test`` (20%) by SHA-256 of its name: the same everywhere."""
    share = int.from_bytes(hashlib.sha256(study_id.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def _projections(folder: Path) -> dict[str, str]:
    path = folder / PROJECTIONS
    return {r["filename"]: r["projection"].lower() for r in _rows(path)} if path.is_file() else {}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    wanted = {
        "indiana_reports.csv": ("uid", "MeSH", "Problems", "indication", "comparison", "findings", "impression"),
        PROJECTIONS: ("uid", "filename", "projection"),
    }[path.name]
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]!r}: take Kaggle's file as it is")
        yield from reader


def _png_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.png")}


def _present(images: list[View], tally: Tally) -> tuple[View, ...]:
    present = tuple(image for image in images if image.file.is_file())
    tally.found["image"] += len(present)
    tally.dropped["image: named by a report, not on disk"] += len(images) - len(present)
    return present


def study_tags(problems: list[str]) -> tuple[int, ...]:
    """The curated problems of a study as one 0/1 for each tag; -1 for all where nothing was curated."""
    names = [problem.lower() for problem in problems]
    if not names or all(name.startswith("no indexing") for name in names):
        return (-1,) * len(TAGS)
    flags = [int(any(n.startswith(PROBLEMS[tag]) for n in names)) if PROBLEMS[tag] else 0 for tag in TAGS]
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
