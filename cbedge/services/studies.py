"""The radiographs that ``cbedge batch`` drafts: those of a folder, a pattern, a file or a table."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cbedge.errors import RadiographError
from cbedge.files import is_same_file
from cbedge.images.file_type import is_dicom
from cbedge.images.radiograph import printable

COLUMNS = ("image", "id", "indication", "comparison", "view", "lateral")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".dcm", ".dicom"})
_SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "$recycle.bin", "__macosx", "system volume information"})
_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json", ".jsonl", ".ndjson", ".xml"})
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_WORKBOOK = "an Excel or OpenDocument workbook"
_OTHER_FORMATS = {b"PK": _WORKBOOK, b"\xd0\xcf\x11\xe0": _WORKBOOK, b"{": "JSON", b"[": "JSON", b"<": "XML or HTML"}
_DELIMITERS = (",", ";", "\t", "|")
# Empty lines, and a line that gives spreadsheet programs the delimiter.
_BEFORE_HEADER = re.compile(r'(?:[ \t,;|"]*\n)*(?:"?sep=[^\n]*\n(?:[ \t,;|"]*\n)*)?', re.IGNORECASE)
_MAX_CSV_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Item:
    """One radiograph to draft.

    Attributes:
        id: its name in the output: the table's ``id``, or its path relative to the given folder.
        image: its file.
        indication, comparison, view: as in :meth:`ReportGenerator.generate`.
        lateral: file of the lateral radiograph of the same study.
        paths: paths of image and lateral as written in the table, so that a table can be moved with its files.
    """

    id: str
    image: Path
    indication: str | None = None
    comparison: str | None = None
    view: str | None = None
    lateral: Path | None = None
    paths: tuple[str, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the inputs, to detect whether an existing draft is still valid."""
        row = [self.paths, self.indication, self.comparison, self.view]
        content = json.dumps(row).encode()
        files = [_state(path) for path in (self.image, self.lateral) if path is not None]
        return {"row": hashlib.sha256(content).hexdigest()[:16], "files": files}


def _state(path: Path) -> list[int] | None:
    """Size and modification time of a file; ``None`` if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _name(path: str) -> str:
    """A path as locale-independent text; bytes that are not UTF-8 become lone surrogates."""
    return path if os.name == "nt" else os.fsencode(path).decode("utf-8", "surrogateescape")


def _path(name: str) -> Path:
    """The inverse of :func:`_name` in the current locale."""
    return Path(name if os.name == "nt" else os.fsdecode(name.encode("utf-8", "surrogateescape")))


@dataclass(frozen=True)
class Found:
    """The content of a folder, pattern or table.

    Attributes:
        items: the radiographs.
        skipped: other files of a folder, judged by suffix and, for DICOM, by content; and folders that are hidden,
            links, of the system, or the batch's own output.
        unreadable: folders that could not be read.
    """

    items: list[Item]
    skipped: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def join_views(items: Sequence[Item]) -> list[Item]:
    """Combine the frontal and lateral DICOM file of a study into one item, if the study has exactly one of each."""
    from cbedge.images.dicom import study_and_view

    views: dict[tuple[str, str], dict[str, list[Item]]] = {}
    for item in items:
        study, view = study_and_view(item.image) if item.lateral is None else (None, None)
        if study and view:
            views.setdefault(study, {}).setdefault(view, []).append(item)
    laterals: dict[str, Path] = {}
    joined: set[str] = set()
    for found in views.values():
        frontal, lateral = found.get("frontal", []), found.get("lateral", [])
        if len(frontal) == len(lateral) == 1:
            laterals[frontal[0].id] = lateral[0].image
            joined.add(lateral[0].id)
    return [replace(i, lateral=laterals.get(i.id, i.lateral)) for i in items if i.id not in joined]


def find_studies(studies: str, documents: Path | None = None) -> Found:
    """The radiographs that a folder (with its subfolders), a pattern such as ``films/*.png``, a file or a table names.

    In a folder, files with an image suffix and all DICOM files are used. A table is a ``.csv``, ``.tsv`` or ``.txt``
    file (separated by commas, semicolons, tabs or vertical bars, in UTF-8 or UTF-16). Its first line names the columns:
    ``image`` (paths relative to the table's folder) and optionally ``id``, ``indication``, ``comparison``, ``view`` and
    ``lateral`` (also a path).

    A folder or pattern leaves out the files of ``documents``, the folder of the batch's drafts, so that no draft is
    read as a radiograph when the batch is resumed.

    Raises:
        RadiographError: nothing is found, ``documents`` is the folder itself, two items have the same id, or a table
            cannot be read.
    """
    path = Path(studies)
    try:
        if path.is_dir():
            found = _read_folder(path, documents)
        elif path.suffix.lower() in _TABLE_SUFFIXES and not _may_be_image(path):
            found = Found(_read_table(path))
        else:
            found = _read_file_or_pattern(path, studies, documents)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RadiographError(f"cannot read {printable(path.name)} ({reason}): check the path") from None
    if not found.items and path.suffix.lower() in _TABLE_SUFFIXES and path.is_file():
        raise RadiographError(f"no radiograph in {printable(path.name)}, which has no rows: give one below the header")
    if not found.items:
        skipped = f" ({len(found.skipped)} other files)" if found.skipped else ""
        raise RadiographError(
            f"no radiograph at {printable(studies)}{skipped}: give a folder, a pattern, a file or a .csv table"
        )
    seen: set[str] = set()
    for item in found.items:
        if item.id in seen:
            raise RadiographError(
                f"{printable(path.name)} has the id {printable(item.id)} twice: give every radiograph a unique id"
            )
        seen.add(item.id)
    return found


def _read_file_or_pattern(path: Path, pattern: str, documents: Path | None) -> Found:
    if path.exists():
        return Found([Item(_name(str(path)), path)] if path.is_file() else [])
    found = Found([])
    for name in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if _is_left_out(name.parent, documents):
            found.skipped.append(_name(str(name)))
        elif name.is_file():
            found.items.append(Item(_name(str(name)), name))
    return found


def _is_left_out(folder: Path, documents: Path | None) -> bool:
    """Whether a folder has no radiographs to draft: a hidden or system folder, or that of the batch's drafts."""
    name = folder.name.casefold()
    return (
        name.startswith(".") or name in _SYSTEM_FOLDERS or (documents is not None and is_same_file(folder, documents))
    )


def _read_folder(folder: Path, documents: Path | None) -> Found:
    if documents is not None and is_same_file(folder, documents):
        raise RadiographError("--documents is the folder of the radiographs: give another folder for the drafts")
    found = Found([])
    for place, folders, names in os.walk(folder, onerror=lambda error: found.unreadable.append(str(error.filename))):
        inside = [Path(place, name) for name in sorted(folders)]
        skipped = [path for path in inside if path.is_symlink() or _is_left_out(path, documents)]  # links may be loops
        folders[:] = [path.name for path in inside if path not in skipped]
        found.skipped.extend(_name(str(path.relative_to(folder))) for path in skipped)
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            name = _name(str(path.relative_to(folder)))
            if _may_be_image(path):
                found.items.append(Item(name, path))
            else:
                found.skipped.append(name)
    found.items.sort(key=lambda item: item.id)
    return found


def _may_be_image(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in _SUFFIXES:
        return True
    with suppress(OSError), open(path, "rb") as file:
        return is_dicom(file.read(132))
    return False


def _decode_table(data: bytes, name: str) -> str:
    kind = next((kind for start, kind in _OTHER_FORMATS.items() if data.lstrip().startswith(start)), None)
    if kind:
        raise RadiographError(f"{name} is {kind}, not a table of text: save it as CSV (UTF-8)")
    bare = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be" if data[:1] == b"\0" else "utf-8"
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), bare)
    try:
        text = data.decode(encoding).rstrip("\x1a")  # DOS ends a text with Ctrl-Z
    except UnicodeDecodeError:
        raise RadiographError(f"{name} is not valid {encoding.upper()}: save it as CSV (UTF-8)") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # Windows; Excel's CSV (Macintosh)
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise RadiographError(f"{name}, line {number}, has a NUL character: save the table again as CSV (UTF-8)")
    return text.lstrip("\ufeff")


def _header(text: str, name: str) -> tuple[str, list[str]]:
    """The delimiter and the column names, in lower case, from the first line."""
    first = text.partition("\n")[0]
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        columns = [" ".join(cell.split()).casefold() for cell in cells]
        if "image" in columns:
            break
    else:
        raise RadiographError(
            f"{name} has no column image in its first line, which must name the columns; possible columns are: "
            f"{', '.join(COLUMNS)}"
        )
    while columns and not columns[-1]:  # some programs end every line with delimiters
        columns.pop()
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        shown = ", ".join(repr(column[:30]) for column in unknown[:5])
        raise RadiographError(f"{name} has unknown columns ({shown}); possible columns are: {', '.join(COLUMNS)}")
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice:
        raise RadiographError(f"{name} has the column {twice} twice: keep one")
    return delimiter, columns


def _read_table(path: Path) -> list[Item]:
    name = printable(path.name)
    try:
        if path.stat().st_size > _MAX_CSV_BYTES:
            raise RadiographError(f"{name} is larger than {_MAX_CSV_BYTES // 2**20} MB: split it")
        text = _decode_table(path.read_bytes(), name)
    except FileNotFoundError:
        raise RadiographError(f"no such file: {name}; check the path") from None
    start = _BEFORE_HEADER.match(text)
    assert start is not None  # it may be empty
    passed, text = start[0].count("\n"), text[start.end() :]
    delimiter, columns = _header(text, name)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    items = []
    try:
        next(reader)
        for row in reader:
            if any(cell.strip() for cell in row):
                cells = _cells(row, columns, delimiter, f"{name}, line {reader.line_num + passed},")
                items.append(_table_item(cells, path.parent))
    except csv.Error as error:
        raise RadiographError(
            f"{name}, line {reader.line_num + passed}, cannot be read ({error}): save the table again as CSV (UTF-8)"
        ) from None
    return items


def _cells(row: list[str], columns: list[str], delimiter: str, line: str) -> dict[str, str]:
    """The cells of a row, by column."""
    while len(row) > len(columns) and not row[-1].strip():
        row.pop()
    if len(row) != len(columns):
        shown = "tab" if delimiter == "\t" else delimiter
        remedy = f"put text with a {shown} in quotes" if len(row) > len(columns) else "add the missing ones"
        raise RadiographError(f"{line} has {len(row)} cells for {len(columns)} columns: {remedy}")
    cells = {column: cell.strip() for column, cell in zip(columns, row, strict=True)}
    if not cells["image"]:
        raise RadiographError(f"{line} has no image path: add it, or remove the line")
    return cells


def _table_item(cells: dict[str, str], folder: Path) -> Item:
    image, lateral = cells["image"], cells.get("lateral")
    return Item(
        cells.get("id") or image,
        folder / _path(image),
        cells.get("indication") or None,
        cells.get("comparison") or None,
        cells.get("view") or None,
        folder / _path(lateral) if lateral else None,
        (image, lateral or ""),
    )
