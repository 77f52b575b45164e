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
# Study → start of the SHA-256 of its findings (lower case, letters and digits): by these the collection is recognised.
_FINGERPRINTS = {
    "CXR65": "91fa22c44345",
    "CXR98": "754d6f31c013",
    "CXR168": "8bce3b57c15b",
    "CXR185": "b81503c2e297",
    "CXR186": "8250629313ad",
    "CXR212": "219ae22b4946",
    "CXR307": "a130ea300108",
    "CXR328": "35ce6f69f0aa",
    "CXR392": "5f6601816301",
    "CXR431": "f25989c88125",
    "CXR470": "43e79d740307",
    "CXR496": "7ddbf8166a5f",
    "CXR513": "28a97746259a",
    "CXR515": "14fb81421756",
    "CXR582": "5814fee0fdef",
    "CXR628": "d371ff341771",
    "CXR631": "f95c1a0d32b8",
    "CXR680": "3dc6ee2653fa",
    "CXR722": "bbdb76c1f18c",
    "CXR728": "9b040a76c76d",
    "CXR764": "aa7996786dfc",
    "CXR780": "375353d69877",
    "CXR826": "0d4de7ff3b47",
    "CXR833": "758b35e7a73a",
    "CXR914": "f1013002307b",
    "CXR927": "f2e7bcd200e2",
    "CXR965": "6c5101d3463e",
    "CXR1019": "3c6bed18258a",
    "CXR1027": "e6156985ac89",
    "CXR1048": "772f7f9bb890",
    "CXR1193": "bb519e9c41f4",
    "CXR1229": "17809736fb72",
    "CXR1243": "d78500aedaaf",
    "CXR1378": "ff65642acc6d",
    "CXR1410": "215b1cd9be0f",
    "CXR1456": "5d39c0a30001",
    "CXR1458": "cd5e77af7810",
    "CXR1484": "500ed544886c",
    "CXR1515": "bee429a4fea8",
    "CXR1524": "1580f15ad2d6",
    "CXR1553": "327512982128",
    "CXR1580": "506cca6f8b9a",
    "CXR1631": "daa8fbda6ea1",
    "CXR1677": "e2016b5b401f",
    "CXR1737": "38e723960529",
    "CXR1867": "fe2241232de0",
    "CXR2030": "7143c75ac299",
    "CXR2052": "a116f1ce754a",
    "CXR2066": "154d53f6e358",
    "CXR2088": "2f97dff99838",
    "CXR2211": "de823a3f6cf5",
    "CXR2223": "7e3e0c036198",
    "CXR2276": "9813a430178d",
    "CXR2350": "f80e59873418",
    "CXR2426": "3acefe9483dd",
    "CXR2467": "757a7a34030e",
    "CXR2491": "a130ea300108",
    "CXR2506": "c9af6174dfc5",
    "CXR2511": "4c5b2a733497",
    "CXR2555": "6dc1e88d9ca1",
    "CXR2558": "d6159720a427",
    "CXR2644": "13f6ad9cac29",
    "CXR2721": "c2c1c5193417",
    "CXR2730": "d8ad8a19e66e",
    "CXR2787": "c243e3481196",
    "CXR2871": "07903e150d79",
    "CXR2893": "c9837523a1ee",
    "CXR2919": "996ec55e934f",
    "CXR2954": "a45ae404291f",
    "CXR2998": "1355d4492677",
    "CXR3047": "35ce6f69f0aa",
    "CXR3124": "907f3bbe1c3b",
    "CXR3126": "b86d6bd6fe5c",
    "CXR3168": "0909c9316412",
    "CXR3211": "17cad812e3c6",
    "CXR3354": "86e86fd25326",
    "CXR3437": "e2c9d9838487",
    "CXR3451": "b863d3d914d4",
    "CXR3470": "9ce46d8abd7e",
    "CXR3485": "06ac888c8a35",
    "CXR3551": "aba617331368",
    "CXR3608": "af1c2f4f6c73",
    "CXR3625": "1c6522f5c775",
    "CXR3637": "4ef3c5b96f6a",
    "CXR3641": "e45efe5827e2",
    "CXR3693": "90857094cf33",
    "CXR3699": "b13eecf3c095",
    "CXR3733": "3e8015b55327",
    "CXR3753": "a4197928179f",
    "CXR3840": "f190127089d3",
    "CXR3849": "bd40e2570396",
    "CXR3854": "3c81020b48e7",
    "CXR3941": "4884e0bceb3f",
    "CXR3970": "c9837523a1ee",
    "CXR3972": "753d2ddf08bb",
    "CXR3995": "d21cbab8f271",
}
_LEAST_RECOGNISED = 3
_OPTIONAL = ("problems", "mesh_major", "mesh_automatic")


def is_iu_xray(folder: Path) -> bool:
    """Whether a folder holds IU X-RAY in a layout that is known here."""
    return _layout(Path(folder)) is not None


def read_studies(folder: Path, splits: tuple[str, ...]) -> list[Study]:
    """Read the studies of some splits; those without a frontal radiograph are left out.

    A study without tags gets those that its report names (:func:`training.datasets.studies.derive_tags`).

    Raises:
        FileNotFoundError: the folder holds none of the known layouts.
        ValueError: a file is damaged; the message names it and the line.
    """
    return derive_tags(studies_of(records(folder), splits))


def is_recognised(folder: Path) -> bool:
    """Whether a folder's reports are those of IU X-RAY: at least three of a sample are there, and none differs."""
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
    """The collection's studies, in any of four layouts, told by what is in the folder:

    - ``studies.jsonl`` and ``images/``: one study a line (``study_id``, ``split``, ``images`` with ``file`` and
      ``view``, ``findings`` or ``impression`` or both; where known ``indication``, ``comparison``, ``patient_id``, and
      tags as ``problems``, ``mesh_major``, ``mesh_automatic``);
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
                raise ValueError(f"{where}: study_id {record.study_id!r} is that of line {before} too: remove one")
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
        raise ValueError(f"{where}: 'findings' and 'impression' are missing; give the report under one or both")
    for key in ("indication", "comparison", "findings", "impression"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} is neither a text nor null")
    for key in _OPTIONAL:
        values = row.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {key} is not a list of texts")
    if row["split"] not in SPLITS:
        raise ValueError(f"{where}: unknown split {row['split']!r}; known: {', '.join(SPLITS)}")
    try:
        images = [View(folder / "images" / image["file"], image.get("view")) for image in row["images"]]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{where}: images is not a list of objects with file and view") from None
    for image in images:
        if image.view not in ("frontal", "lateral", None):
            raise ValueError(f"{where}: unknown view {str(image.view)[:20]!r}; give frontal or lateral, or null")
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
            f"CXR{row['uid']}",
            split(f"CXR{row['uid']}"),
            _present(images, tally),
            row["indication"] or None,
            row["comparison"] or None,
            row["findings"] or None,
            row["impression"] or None,
            study_tags(problems),
            tags_given=bool(problems),
        )


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
            name.get("id", ""),
            split(name.get("id", "")),
            _present(images, tally),
            text.get("INDICATION") or None,
            text.get("COMPARISON") or None,
            text.get("FINDINGS") or None,
            text.get("IMPRESSION") or None,
            study_tags(problems),
            tags_given=bool(problems),
        )


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
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the column {missing[0]!r}: take Kaggle's file as it is")
            for row in reader:
                if any(row[name] is None for name in wanted):
                    raise ValueError(
                        f"{path}, line {reader.line_num}, has too few columns: take Kaggle's file as it is"
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
    tally.dropped["image: named by a report, not on disk"] += len(images) - len(present)
    return present


def study_tags(problems: list[str]) -> tuple[int, ...]:
    """The curated problems of a study as one 0/1 for each tag; -1 for all where nothing was curated."""
    names = [problem.lower() for problem in problems]
    if not names or all(name.startswith("no indexing") for name in names):
        return (-1,) * len(TAGS)
    flags = [int(any(n.startswith(ONTOLOGY[tag].iu_xray) for n in names)) for tag in TAGS]
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
