"""The IU X-RAY collection (Open-i), in four layouts.

Demner-Fushman et al., J Am Med Inform Assoc 2016;23(2):304-310. CC BY-NC-ND 4.0: never copied into this repository.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from cbedge.errors import ContextError
from cbedge.prompt import normalize_view
from training.datasets.collection import Collection
from training.datasets.provenance import Provenance
from training.datasets.studies import SPLITS, Record, Study, Tally, View, derive_tags, studies_of
from training.ontology import ONTOLOGY, TAGS

PROJECTIONS = "indiana_projections.csv"
ANNOTATION = "annotation.json"
STUDIES = "studies.jsonl"
PROVENANCE = Provenance(
    "IU X-RAY (Open-i)",
    "CC BY-NC-ND 4.0",
    "https://openi.nlm.nih.gov",
    "Demner-Fushman et al., J Am Med Inform Assoc 2016;23(2):304-310",
    population="Adults of one American health network, English reports from the years before 2013.",
)
# Study → start of the SHA-256 of its findings (lower case, letters and digits), to recognize the collection.
_FINGERPRINTS = json.loads(Path(__file__).with_name("iu_xray_fingerprints.json").read_text(encoding="utf-8"))
_LEAST_RECOGNISED = 3
_OPTIONAL = ("problems", "mesh_major", "mesh_automatic")


def is_iu_xray(folder: Path) -> bool:
    """Whether a folder has IU X-RAY in a known layout."""
    return _layout(Path(folder)) is not None


def read_studies(folder: Path, splits: tuple[str, ...]) -> list[Study]:
    """Read the studies of some splits that have a frontal radiograph.

    A study without tags gets those that its report names (:func:`training.datasets.studies.derive_tags`).

    Raises:
        FileNotFoundError: the folder has no known layout.
        ValueError: a file is damaged; the message names it and the line.
    """
    return derive_tags(studies_of(records(folder), splits))


def is_recognised(folder: Path) -> bool:
    """Whether a folder's reports are those of IU X-RAY: at least three of a sample are present, and none differs."""
    same = 0
    for record in records(folder):
        wanted = _FINGERPRINTS.get(record.study_id.split("_")[0])
        if wanted is None or not record.findings:
            continue
        text = re.sub(r"[^a-z0-9]+", " ", record.findings.lower()).strip()
        if hashlib.sha256(text.encode()).hexdigest()[: len(wanted)] != wanted:
            return False
        same += 1
    return same >= _LEAST_RECOGNISED


def records(folder: Path, tally: Tally | None = None) -> Iterator[Record]:
    """The collection's studies, in any of four layouts, which are recognized by their files:

    - ``studies.jsonl`` and ``images/``: one study per line (``study_id``, ``split``, ``images`` with ``file`` and
      ``view``, ``findings`` or ``impression`` or both; optional ``indication``, ``comparison``, ``patient_id``, and
      tags as ``problems``, ``mesh_major``, ``mesh_automatic``);
    - ``indiana_reports.csv`` and ``indiana_projections.csv`` (Kaggle), with PNGs in any subfolder;
    - ``annotation.json`` (R2Gen) and ``images/``: findings only, no indication, no tags; image 0 counts as frontal;
    - the Open-i release: XML reports and PNGs in any subfolder. Its reports do not say the view of an image; Kaggle's
      ``indiana_projections.csv`` in the folder does.

    R2Gen's splits come from its ``annotation.json`` in the folder. Without it, a hash of the study's name assigns 70%
    to train, 10% to val and 20% to test, and scores do not compare with published ones.

    Raises:
        FileNotFoundError: the folder has none of these.
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
    path = folder / STUDIES
    seen: dict[str, int] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise ValueError(f"{where}, is not UTF-8: save the file as UTF-8") from None
            if not text:
                continue
            record = _jsonl_record(text, folder, where, tally)
            if (before := seen.setdefault(record.study_id, number)) != number:
                raise ValueError(f"{where}: study_id {record.study_id!r} also occurs in line {before}: remove one")
            tally.found["study"] += 1
            yield record


def _jsonl_record(text: str, folder: Path, where: str, tally: Tally) -> Record:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}, is not a study ({type(error).__name__}: {error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}, is not a study: give a JSON object")
    for key in ("study_id", "split", "images"):
        if key not in row:
            raise ValueError(f"{where}: {key!r} is missing")
    if "findings" not in row and "impression" not in row:
        raise ValueError(f"{where}: 'findings' and 'impression' are missing; give the report in one or both")
    for key in ("indication", "comparison", "findings", "impression"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} must be a string or null")
    for key in _OPTIONAL:
        values = row.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {key} must be a list of strings")
    if row["split"] not in SPLITS:
        raise ValueError(f"{where}: unknown split {row['split']!r}; known: {', '.join(SPLITS)}")
    try:
        images = [View(folder / "images" / image["file"], normalize_view(image.get("view"))) for image in row["images"]]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{where}: images must be a list of objects with file and view") from None
    except ContextError as error:
        raise ValueError(f"{where}: {error}, or null") from None
    patient = row.get("patient_id")
    return Record(
        str(row["study_id"]),
        row["split"],
        _present(images, tally),
        row.get("indication"),
        row.get("comparison"),
        row.get("findings"),
        row.get("impression"),
        study_tags([problem for key in _OPTIONAL for problem in row.get(key) or []]),
        place=where,
        patient=None if patient in (None, "") else str(patient),
        missing=tuple(image.file for image in images if not image.file.is_file()),
        tags_given=any(row.get(key) for key in _OPTIONAL),
    )


def _kaggle(folder: Path, tally: Tally) -> Iterator[Record]:
    views = _projections(folder)
    if not views:
        raise FileNotFoundError(f"no {PROJECTIONS} in {folder}: it names the images of indiana_reports.csv")
    by_study: dict[str, list[str]] = {}
    for name in views:
        by_study.setdefault(name.split("_")[0], []).append(name)
    files, split = _png_files(folder), _splits(folder, tally)
    for row in _rows(folder / "indiana_reports.csv"):
        images = [View(files.get(name, folder / name), views[name]) for name in by_study.get(row["uid"], ())]
        problems = [p.strip() for p in (row["Problems"] + ";" + row["MeSH"]).split(";") if p.strip()]
        yield _record(f"CXR{row['uid']}", split, images, row, problems, tally)


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
            raise ValueError(f"{path} is not valid XML ({error}): download it again") from None
        name = root.find("uId")
        if name is None:
            tally.dropped["file: XML without a report"] += 1
            continue
        text = {a.get("Label", "").lower(): (a.text or "").strip() for a in root.iter("AbstractText")}
        images = []
        for image in (node.get("id", "") for node in root.iter("parentImage")):
            kaggle = f"{image.removeprefix('CXR')}.dcm.png"
            images.append(View(files.get(f"{image}.png", folder / image), views.get(kaggle)))
        problems = [node.text or "" for tag in ("major", "automatic") for node in root.iter(tag)]
        yield _record(name.get("id", ""), split, images, text, problems, tally)


def _record(
    name: str, split: Callable[[str], str], images: list[View], text: dict[str, str], problems: list[str], tally: Tally
) -> Record:
    tally.found["study"] += 1
    indication, comparison, findings, impression = (
        text.get(key) or None for key in ("indication", "comparison", "findings", "impression")
    )
    sections = (indication, comparison, findings, impression, study_tags(problems))
    return Record(name, split(name), _present(images, tally), *sections, tags_given=bool(problems))


def _r2gen(folder: Path, tally: Tally) -> Iterator[Record]:
    tally.notes.append("R2Gen's annotation.json has only findings: no indication, comparison, impression or tags.")
    tally.notes.append("Image 0 of a study counts as frontal, image 1 as lateral.")
    for split, rows in _annotation(folder).items():
        for row in rows:
            images = [
                View(folder / "images" / file, "frontal" if number == 0 else "lateral")
                for number, file in enumerate(row["image_path"])
            ]
            tally.found["study"] += 1
            yield Record(row["id"], split, _present(images, tally), findings=row["report"] or None, tags_given=False)


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
        f"No {ANNOTATION} (R2Gen's splits): a hash of their name assigns studies 70/10/20 to splits, and scores do not "
        "compare with published ones."
    )
    return hashed_split


def hashed_split(study_id: str) -> str:
    """Assign a study to ``train`` (70%), ``val`` (10%) or ``test`` (20%) by the SHA-256 of its name."""
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
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the column {missing[0]!r}: use Kaggle's unchanged file")
            for row in reader:
                if any(row[name] is None for name in wanted):
                    raise ValueError(
                        f"{path}, line {reader.line_num}, has too few columns: use Kaggle's unchanged file"
                    )
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            where = f"{path}, after line {reader.line_num}"
            raise ValueError(f"{where}: {type(error).__name__}: save the file as CSV in UTF-8") from None


def _png_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.png")}


def _present(images: list[View], tally: Tally) -> tuple[View, ...]:
    present = tuple(image for image in images if image.file.is_file())
    tally.found["image"] += len(present)
    tally.dropped["image: in a report, but not on disk"] += len(images) - len(present)
    return present


def study_tags(problems: list[str]) -> tuple[int, ...]:
    """The index terms of a study as tags: 0 or 1 each, or -1 for all if there are none.

    The collection's annotators chose most terms from the report; a program added others (``mesh_automatic``).
    """
    names = [problem.lower() for problem in problems]
    if not names or all(name.startswith("no indexing") for name in names):
        return (-1,) * len(TAGS)
    flags = [int(any(n.startswith(ONTOLOGY[tag].iu_xray) for n in names)) for tag in TAGS]
    others = ("normal", "no indexing", "technical quality of image unsatisfactory")
    flags[0] = int(any(not n.startswith(others) for n in names))
    return tuple(flags)


def clean_reference(report: str) -> str:
    """Clean an IU X-RAY report by R2Gen's rules (Chen et al., EMNLP 2020), which published scores use.

    Repeated full stops and list numbers are removed, text is lower-cased, and only words, digits and the full stops
    between sentences are kept.
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


def _open(folder: Path, splits: tuple[str, ...], limit: int | None, cache: Path) -> list[Study]:
    return [study for study in read_studies(folder, splits) if study.target][:limit]


IU_XRAY = Collection(
    files="studies.jsonl, indiana_reports.csv, annotation.json or XML reports",
    provenance=PROVENANCE,
    is_in=is_iu_xray,
    is_recognised=is_recognised,
    studies=_open,
    records=lambda folder, tally, cache: records(folder, tally),
)
