"""MIMIC-CXR-JPG in PhysioNet's layout, with the free-text reports of MIMIC-CXR.

Johnson et al., Sci Data 2019;6:317 (MIMIC-CXR) and arXiv:1901.07042 (MIMIC-CXR-JPG). The tables are joined once into an
SQLite index on disk, so memory does not depend on the number of images. The index contains report text, so it must be
protected like the data.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.datasets.collection import Collection
from training.datasets.provenance import Provenance
from training.datasets.studies import Record, Study, Tally, View, make_study
from training.ontology import ONTOLOGY, TAGS

PREFIX = "mimic-cxr-2.0.0-"
IMAGES = 377_110  # rows of PhysioNet's split table
PROVENANCE = Provenance(
    "MIMIC-CXR-JPG 2.0.0",
    "PhysioNet Credentialed Health Data License 1.5.0",
    "https://physionet.org/content/mimic-cxr-jpg/2.0.0/",
    "Johnson et al., Sci Data 2019;6:317, and arXiv:1901.07042",
    population="Adults of one American hospital, most from its emergency department, English reports of 2011 to 2016.",
)
TABLES = {
    "split": ("dicom_id", "study_id", "subject_id", "split"),
    "metadata": ("dicom_id", "ViewPosition"),
    "chexpert": ("study_id", "No Finding"),
}
VIEWS = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}
SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Za-z ,/&()-]{2,60}?)[ \t]*:", re.MULTILINE)
_SECTIONS = {
    "findings": ("FINDINGS", "FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION", "FINDING", "CHEST PA AND LATERAL"),
    "impression": ("IMPRESSION", "CONCLUSION", "CONCLUSIONS"),
    "indication": (
        "INDICATION",
        "INDICATIONS",
        "REASON FOR EXAM",
        "REASON FOR EXAMINATION",
        "REASON FOR STUDY",
        "HISTORY",
        "CLINICAL HISTORY",
        "CLINICAL INFORMATION",
        "CLINICAL INDICATION",
    ),
    "comparison": ("COMPARISON", "COMPARISONS", "COMPARISON STUDY", "COMPARISON FILM"),
}
_BY_HEADING = {heading: section for section, headings in _SECTIONS.items() for heading in headings}
_SCHEMA = """
CREATE TABLE image (dicom_id TEXT PRIMARY KEY, study INTEGER, subject INTEGER, split TEXT, position TEXT) WITHOUT ROWID;
CREATE INDEX image_study ON image (study, dicom_id);
CREATE TABLE label (study INTEGER PRIMARY KEY, tags TEXT);
CREATE TABLE record (row INTEGER PRIMARY KEY, split TEXT, value TEXT, length INTEGER, abnormal INTEGER);
CREATE TABLE tally (kind TEXT, name TEXT, count INTEGER);
"""


def is_mimic_cxr(folder: Path) -> bool:
    """Whether a folder has the tables of MIMIC-CXR-JPG."""
    return _table(Path(folder), "split") is not None


def is_recognised(folder: Path) -> bool:
    """Whether a folder's split table is PhysioNet's, with all 377,110 images."""
    path = _table(Path(folder), "split")
    return path is not None and sum(1 for _ in _rows(path, TABLES["split"])) == IMAGES


def parse_report(text: str) -> dict[str, str]:
    """The sections of a free-text report: ``findings``, ``impression``, ``indication``, ``comparison``.

    A heading is the start of a line up to a colon, in capitals (or a known heading in any case). If a section occurs
    twice (an addendum), the first one is kept. "FINDINGS AND IMPRESSION" counts as findings. Text without a heading, or
    with an unknown one ("WET READ"), is left out.
    """
    marks = [m for m in _HEADING.finditer(text) if m[1].isupper() or m[1].upper().strip() in _BY_HEADING]
    sections: dict[str, str] = {}
    for mark, following in itertools.zip_longest(marks, marks[1:]):
        section = _BY_HEADING.get(re.sub(r"\s+", " ", mark[1].upper()).strip())
        body = re.sub(r"\s+", " ", text[mark.end() : following.start() if following else None]).strip()
        if section and body:
            sections.setdefault(section, body)
    return sections


def build_index(folder: Path, index: Path, tally: Tally | None = None) -> Tally:
    """Join tables and reports of a folder into ``index``; an existing index is opened.

    A study is kept if it has a frontal image on disk and a report with findings or an impression.

    Raises:
        FileNotFoundError: a table or every report is missing.
        ValueError: a table is damaged or lacks a column.
    """
    folder, tally = Path(folder), tally or Tally()
    paths = {name: _table(folder, name) for name in TABLES}
    for name, path in paths.items():
        if path is None:
            raise FileNotFoundError(f"no {PREFIX}{name}.csv.gz in {folder}: it is part of MIMIC-CXR-JPG")
    if index.is_file():
        return _read_tally(index, tally)
    index.parent.mkdir(parents=True, exist_ok=True)
    partial = index.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    base = sqlite3.connect(partial)
    try:
        base.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
        _join(base, {name: path for name, path in paths.items() if path}, tally)
        for row, record in enumerate(_records(base, folder, tally)):
            study = make_study(record, Path())
            values = (row, record.split, _dump(record, folder), len(study.target), study.tags[0])
            base.execute("INSERT INTO record VALUES (?, ?, ?, ?, ?)", values)
        base.execute("DROP TABLE image")
        base.execute("DROP TABLE label")
        base.execute("CREATE INDEX record_split ON record (split, row)")
        for kind in ("found", "dropped"):
            counts = getattr(tally, kind).items()
            base.executemany("INSERT INTO tally VALUES (?, ?, ?)", [(kind, name, count) for name, count in counts])
        base.commit()
        base.execute("VACUUM")
    except BaseException:
        base.close()
        partial.unlink(missing_ok=True)
        raise
    base.close()
    os.replace(partial, index)
    return tally


def index_path(folder: Path, cache: Path) -> Path:
    """The path of a folder's index, named after the tables' paths, sizes and dates."""
    key = hashlib.sha256()
    for name in TABLES:
        path = _table(Path(folder), name)
        if path is not None:
            stat = path.stat()
            key.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return cache / f"mimic-cxr-{key.hexdigest()[:16]}.sqlite"


def records(index: Path, folder: Path) -> Iterator[Record]:
    """The records of an index."""
    base = sqlite3.connect(index)
    try:
        for (value,) in base.execute("SELECT value FROM record ORDER BY row"):
            yield _load(value, Path(folder))
    finally:
        base.close()


class IndexedStudies(Sequence[Study]):
    """The studies of some splits with a frontal radiograph and a usable report, read from the index one at a time.

    Args:
        index: an index of :func:`build_index`.
        splits: of ``train``, ``val``, ``test``.

    Attributes:
        lengths: number of characters of each target.
        abnormal: 1 for each study that is known to be abnormal, else 0.
    """

    def __init__(self, index: Path, folder: Path, splits: tuple[str, ...]):
        self._base = sqlite3.connect(f"file:{index}?mode=ro", uri=True, check_same_thread=False)
        self._folder = Path(folder)
        query = f"SELECT row, length, abnormal FROM record WHERE split IN ({', '.join('?' * len(splits))}) ORDER BY row"
        self._rows, self.lengths, self.abnormal = array("l"), array("l"), array("b")
        for row, length, abnormal in self._base.execute(query, splits):
            if length:
                self._rows.append(row)
                self.lengths.append(length)
                self.abnormal.append(int(abnormal == 1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        (value,) = self._base.execute("SELECT value FROM record WHERE row = ?", (self._rows[key],)).fetchone()
        record = _load(value, self._folder)
        return make_study(record, next(view.file for view in record.images if view.view == "frontal"))


def _table(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{PREFIX}{name}.csv.gz", folder / f"{PREFIX}{name}.csv") if p.is_file()), None)


def _rows(path: Path, wanted: tuple[str, ...]) -> Iterator[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the column {missing[0]!r}: use PhysioNet's unchanged file")
            yield from reader
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): download it again") from None


def _join(base: sqlite3.Connection, paths: dict[str, Path], tally: Tally) -> None:
    def images() -> Iterator[tuple[str, int, int, str]]:
        for row in _rows(paths["split"], TABLES["split"]):
            if row["split"] not in SPLIT_NAMES:
                raise ValueError(f"{paths['split']}: unknown split {row['split']!r}")
            tally.found["row of split table"] += 1
            yield row["dicom_id"], int(row["study_id"]), int(row["subject_id"]), SPLIT_NAMES[row["split"]]

    def positions() -> Iterator[tuple[str, str]]:
        for row in _rows(paths["metadata"], TABLES["metadata"]):
            tally.found["row of metadata table"] += 1
            yield row["ViewPosition"], row["dicom_id"]

    def labels() -> Iterator[tuple[int, str]]:
        for row in _rows(paths["chexpert"], TABLES["chexpert"]):
            tally.found["row of chexpert table"] += 1
            yield int(row["study_id"]), " ".join(map(str, chexpert_tags(row)))

    base.executemany("INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?, NULL)", images())
    base.executemany("UPDATE image SET position = ? WHERE dicom_id = ?", positions())
    base.executemany("INSERT OR REPLACE INTO label VALUES (?, ?)", labels())
    base.commit()


def _records(base: sqlite3.Connection, folder: Path, tally: Tally) -> Iterator[Record]:
    query = (
        "SELECT image.study, subject, split, dicom_id, position, tags FROM image LEFT JOIN label "
        "ON label.study = image.study ORDER BY image.study, dicom_id"
    )
    unlabelled = " ".join(["-1"] * len(TAGS))
    for (study, subject, split), rows in itertools.groupby(base.execute(query), key=lambda row: row[:3]):
        group = list(rows)
        tally.found["study"] += 1
        place = f"files/p{str(subject)[:2]}/p{subject}/s{study}"
        views, rank = [], {}
        for _, _, _, dicom_id, position, _ in group:
            file = folder / place / f"{dicom_id}.jpg"
            if VIEWS.get(position or "") is None:
                tally.dropped[f"image: view {position or 'not given'}"] += 1
            elif not file.is_file():
                tally.dropped["image: in the tables, but not on disk"] += 1
            else:
                tally.found["image"] += 1
                views.append(View(file, VIEWS[position]))
                rank[dicom_id] = (VIEWS[position], position != "PA")
        # The first frontal view is used: PA before AP, because it shows the heart's true size.
        views.sort(key=lambda view: rank[view.file.stem])
        if not any(view.view == "frontal" for view in views):
            tally.dropped["study: no frontal radiograph on disk"] += 1
            continue
        report = folder / f"{place}.txt"
        try:
            sections = parse_report(report.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            tally.dropped["study: no report on disk"] += 1
            continue
        if not sections.get("findings") and not sections.get("impression"):
            tally.dropped["study: report without findings and impression"] += 1
            continue
        if group[0][5] is None:
            tally.dropped["label: study not in the chexpert table (study kept)"] += 1
        tags = tuple(int(t) for t in (group[0][5] or unlabelled).split())
        yield Record(
            f"s{study}",
            split,
            tuple(views),
            sections.get("indication"),
            sections.get("comparison"),
            sections.get("findings"),
            sections.get("impression"),
            tags,
        )


def chexpert_tags(row: dict[str, str]) -> tuple[int, ...]:
    """A row of the CheXpert table as tags: 1 present, 0 absent or not mentioned, -1 uncertain or not among the 14."""
    tags = []
    for tag in TAGS:
        if tag == "abnormal":
            named = [v for k, v in row.items() if k not in ("subject_id", "study_id", "No Finding")]
            tags.append(0 if _one(row.get("No Finding")) else 1 if any(map(_one, named)) else -1)
        elif ONTOLOGY[tag].chexpert:
            values = [row.get(label) for label in ONTOLOGY[tag].chexpert]
            uncertain = any(value in ("-1", "-1.0") for value in values)
            tags.append(1 if any(map(_one, values)) else -1 if uncertain else 0)
        else:
            tags.append(-1)
    return tuple(tags)


def _one(value: str | None) -> bool:
    return value in ("1", "1.0")


def _dump(record: Record, folder: Path) -> str:
    values = vars(record) | {
        "images": [[str(v.file.relative_to(folder)), v.view] for v in record.images],
        "missing": (),
    }
    return json.dumps(values)


def _load(value: str, folder: Path) -> Record:
    values = json.loads(value)
    images = tuple(View(folder / file, view) for file, view in values.pop("images"))
    return Record(**values | {"images": images, "tags": tuple(values["tags"])})


def _read_tally(index: Path, tally: Tally) -> Tally:
    base = sqlite3.connect(index)
    for kind, name, count in base.execute("SELECT kind, name, count FROM tally"):
        getattr(tally, kind)[name] += count
    base.close()
    return tally


def _open_studies(folder: Path, splits: tuple[str, ...], limit: int | None, cache: Path) -> Sequence[Study]:
    index = index_path(folder, cache)
    build_index(folder, index)
    studies = IndexedStudies(index, folder, splits)
    return studies if limit is None else studies[:limit]


def _open_records(folder: Path, tally: Tally, cache: Path) -> Iterator[Record]:
    index = index_path(folder, cache)
    build_index(folder, index, tally)
    return records(index, folder)


MIMIC_CXR = Collection(
    files="mimic-cxr-2.0.0-split.csv.gz and its neighbours",
    provenance=PROVENANCE,
    is_in=is_mimic_cxr,
    is_recognised=is_recognised,
    studies=_open_studies,
    records=_open_records,
)
