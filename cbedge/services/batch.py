"""Draft the reports of many radiographs, one JSON line each; a run can be resumed after any interruption.

Each line is written and synced before the next radiograph is started. When a killed run is resumed, its incomplete last
line is removed. So only the current draft is lost, and none is written twice.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from cbedge.api import ReportGenerator
from cbedge.decoding import Decoding
from cbedge.errors import CbedgeError, OutputError, RadiographError
from cbedge.file_names import safe_name
from cbedge.files import check_output, lock_file, lock_path, open_atomically, write_output
from cbedge.images.dicom_file import is_dicom
from cbedge.images.radiograph import printable
from cbedge.outputs import FORMATS, render
from cbedge.report import Report

COLUMNS = ("image", "id", "indication", "comparison", "view", "lateral")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".dcm", ".dicom"})
_DELIMITERS = (",", ";", "\t")
_START = b'{"id": '  # start of every output line
_MAX_CSV_BYTES = 256 * 2**20
_OWNER = ".cbedge-batch"  # file in a folder of documents


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
        skipped: other files of a folder, judged by suffix and, for DICOM, by content.
        unreadable: folders that could not be read.
    """

    items: list[Item]
    skipped: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """Result of a run: number of drafts written, number of items that were already done, and failures of this or an
    earlier run as (id, message)."""

    written: int
    skipped: int
    failed: list[tuple[str, str]]


def find_items(studies: str) -> list[Item]:
    """The radiographs of :func:`find_studies`."""
    return find_studies(studies).items


def pair_views(items: Sequence[Item]) -> list[Item]:
    """Combine the frontal and lateral DICOM file of a study into one item, if the study has exactly one of each."""
    from cbedge.images.dicom import header_view
    from cbedge.images.dicom_file import read_header

    views: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        header = None if item.lateral is not None else read_header(item.image, needed=False)
        uid, view = (None, None) if header is None else (str(header.get("StudyInstanceUID") or ""), header_view(header))
        if uid and view:
            views.setdefault(uid, {}).setdefault(view, []).append(item)
    laterals: dict[str, Path] = {}
    joined: set[str] = set()
    for found in views.values():
        frontal, lateral = found.get("frontal", []), found.get("lateral", [])
        if len(frontal) == len(lateral) == 1:
            laterals[frontal[0].id] = lateral[0].image
            joined.add(lateral[0].id)
    return [replace(i, lateral=laterals.get(i.id, i.lateral)) for i in items if i.id not in joined]


def find_studies(studies: str) -> Found:
    """The radiographs that a folder (with its subfolders), a pattern such as ``films/*.png``, a file or a table names.

    In a folder, files with an image suffix and all DICOM files are used. A table is a ``.csv`` file (separated by
    commas, semicolons or tabs) with a column ``image`` (paths relative to the table's folder) and optionally ``id``,
    ``indication``, ``comparison``, ``view`` and ``lateral`` (also a path).

    Raises:
        RadiographError: nothing is found, two items have the same id, or a table cannot be read.
    """
    path = Path(studies)
    try:
        if path.is_dir():
            found = _read_folder(path)
        elif path.suffix.lower() in (".csv", ".tsv"):
            found = Found(_read_table(path))
        else:
            names = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(studies, recursive=True))]
            found = Found([Item(_name(str(name)), name) for name in names if name.is_file()])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RadiographError(f"cannot read {printable(path.name)} ({reason}): check the path") from None
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


def _read_folder(folder: Path) -> Found:
    found = Found([])
    for place, folders, names in os.walk(folder, onerror=lambda error: found.unreadable.append(str(error.filename))):
        folders.sort()
        links = [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]  # may be loops
        found.skipped.extend(_name(str(link.relative_to(folder))) for link in links)
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith("."):
                continue
            if _may_be_image(path):
                found.items.append(Item(_name(str(path.relative_to(folder))), path))
            else:
                found.skipped.append(_name(str(path.relative_to(folder))))
    found.items.sort(key=lambda item: item.id)
    return found


# Drafts one item and returns the values of its line.
Draft = Callable[[Item], dict[str, Any]]


@dataclass(frozen=True)
class Documents:
    """Additional output: each draft as a separate file.

    Attributes:
        folder: folder for the files.
        form: a name of :data:`cbedge.outputs.FORMATS`.
    """

    folder: Path
    form: str

    def prepare(self, out: Path, force: bool) -> None:
        """Create the folder, or open the one that the same batch created: a file in it names the batch's output.

        Args:
            out: the batch's JSON Lines file.
            force: allow overwriting existing files.

        Raises:
            OutputError: the folder has files of another origin, or cannot be created.
        """
        marker, owner = self.folder / _OWNER, os.fsencode(os.path.realpath(out))
        try:
            self.folder.mkdir(exist_ok=True)
            is_own = marker.is_file() and marker.read_bytes() == owner
            if not (is_own or force) and any(self.folder.iterdir()):
                raise OutputError(f"{self.folder} already has files: give a new folder, or --force")
            marker.write_bytes(owner)
        except OSError as error:
            raise OutputError(f"cannot create the folder {self.folder}: {error.strerror}; give another one") from None

    def write(self, item: Item, report: Report) -> None:
        """Write one draft.

        Raises:
            OutputError: it cannot be written.
            RadiographError: the format needs a DICOM file, and the radiograph is not one.
        """
        content = render(report, self.form, item.image)
        write_output(self.folder / f"{safe_name(item.id)}{FORMATS[self.form].suffix}", content, True, [item.image])


def draft_item(
    item: Item,
    generator: ReportGenerator,
    max_new_tokens: int | None,
    accept_any_image: bool,
    decoding: Decoding | None = None,
    documents: Documents | None = None,
) -> dict[str, Any]:
    """Draft one radiograph: the values of its line, with ``status`` ``ok``, or ``failed`` and ``error``.

    Raises:
        OutputError: a document cannot be written.
    """
    try:
        report = generator.generate(
            item.image,
            indication=item.indication,
            comparison=item.comparison,
            view=item.view,
            lateral=item.lateral,
            max_new_tokens=max_new_tokens,
            accept_any_image=accept_any_image,
            decoding=decoding,
        )
        if documents is not None:
            documents.write(item, report)
    except OutputError:
        raise
    except CbedgeError as error:
        return {"status": "failed", "error": str(error)}
    except MemoryError:
        name = printable(item.image.name)
        return {"status": "failed", "error": f"not enough memory for {name}: scale it down"}
    return {"status": "ok", **json.loads(report.to_json())}


def run_batch(
    items: Sequence[Item],
    out: Path,
    model: str,
    draft: Draft,
    retry_failed: bool = False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Draft every item that is not in ``out`` yet, and append a line for each.

    Args:
        items: see :func:`find_items`.
        out: JSON Lines file; the file of an earlier run is resumed.
        model: name, version and variant of the model, and other settings that change drafts; the same in a whole file.
        draft: drafts one item.
        retry_failed: retry items that failed before; their old lines are removed.
        progress: called after every item.

    Raises:
        OutputError: ``out`` is not a batch output, is of another model, or cannot be written.
    """
    try:
        out = Path(os.path.realpath(out))  # one lock for a file and its links; links are kept
        check_output(out, True, regular=True)  # it is read again
        lock = lock_file(
            lock_path(out), f"another cbedge batch is writing {out.name}: wait for it, or give another --out"
        )
        try:
            return _run_locked(items, out, model, draft, retry_failed, progress)
        finally:
            lock.release()
    except OSError as error:
        raise OutputError(
            f"cannot write {out.name}: {error.strerror}; finished drafts are kept, run the command again to resume"
        ) from None


def _run_locked(
    items: Sequence[Item], out: Path, model: str, draft: Draft, retry_failed: bool, progress: Callable[[Tally], None]
) -> Tally:
    prints = {item.id: item.fingerprint() for item in items}
    done = _open_lines(out, model, retry_failed, {item.id: item for item in items}, prints)
    tally = Tally(0, 0, [])
    for item in items:
        if item.id in done:
            tally.skipped += 1
            if (error := done[item.id]) is not None:
                tally.failed.append((item.id, error))
            progress(tally)
    with open(out, "ab") as file:
        for item in (item for item in items if item.id not in done):
            line = draft(item)
            if line["status"] == "ok":
                tally.written += 1
            else:
                tally.failed.append((item.id, line["error"]))
            _append(file, {"id": item.id, "batch_model": model, "batch_input": prints[item.id], **line})
            progress(tally)
    return tally


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a batch output; blank lines and the incomplete last line of a killed run are skipped.

    Raises:
        OutputError: the file is not a batch output.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            line = line.strip(b"\0 \t\r\n")
            begun = line[: len(_START)] == _START[: len(line)]
            if not line or (begun and not whole):
                continue
            if begun and b"\0" in line:  # damaged by a power failure, then continued by an older version
                continue
            try:
                values = json.loads(line)
                _ = values["id"], values["batch_model"], values["status"]
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{path.name}, line {number}, was not written by cbedge batch: give another --out"
                ) from None
            yield values


def write_parquet(lines: Path, target: Path, replace: bool = True, inputs: Iterable[Path] = ()) -> None:
    """Convert a batch output to a Parquet table; nested values become JSON text.

    Args:
        lines: the batch output.
        target, replace, inputs: as in :func:`cbedge.files.write_output`; ``lines`` is never overwritten.

    Raises:
        OutputError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow; type: pip install pyarrow") from None
    rows = [
        {k: json.dumps(v) if isinstance(v, dict | list) else _valid(v) for k, v in line.items()}
        for line in read_lines(lines)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    write_output(target, content.getvalue(), replace, [*inputs, lines])


def _valid(value: Any) -> Any:
    """Text with lone surrogates escaped, because Parquet cannot store them."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _open_lines(
    out: Path, model: str, retry_failed: bool, items: dict[str, Item], prints: dict[str, dict[str, Any]]
) -> dict[str, str | None]:
    """Ids of finished items, each with its error or ``None``; outdated lines are removed from the file."""
    if not out.exists():
        return {}
    lines = list(read_lines(out))
    other = next((line["batch_model"] for line in lines if line["batch_model"] != model), None)
    if other is not None:
        raise OutputError(
            f"{out.name} was begun with {other}, but this run uses {model}: use the same model, or another --out"
        )
    kept = {
        line["id"]: line
        for line in lines
        if (line["status"] == "ok" or not retry_failed)
        and _is_current(line, items.get(line["id"]), prints.get(line["id"]))
    }
    if sum(map(_size_of, kept.values())) != out.stat().st_size:
        with open_atomically(out) as file:
            for line in kept.values():
                file.write(_encoded(line))
    return {name: line.get("error") if line["status"] == "failed" else None for name, line in kept.items()}


def _is_current(line: dict[str, Any], item: Item | None, now: dict[str, Any] | None) -> bool:
    """Whether a line was written from the item's current inputs; lines of older versions count as current.

    A draft is also kept if its file cannot be read now, for example on an offline network share. A file with another
    modification time, such as a copy, is compared by content.
    """
    before = line.get("batch_input")
    if item is None or now is None or before is None or before == now:
        return True
    if before["row"] != now["row"] or len(before["files"]) != len(now["files"]):
        return False
    if line["status"] != "ok":
        return False
    files = [path for path in (item.image, item.lateral) if path is not None]
    hashes = (line["image_sha256"], line.get("lateral_sha256"))
    for path, old, new, digest in zip(files, before["files"], now["files"], hashes, strict=False):
        if old != new and new is not None and _sha256(path) not in (digest, None):
            return False
    return True


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _size_of(line: dict[str, Any]) -> int:
    return len(_encoded(line))


def _encoded(values: dict[str, Any]) -> bytes:
    # File names that are not UTF-8 have lone surrogates; escaped, they are valid JSON and survive a round trip.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _append(file: IO[bytes], values: dict[str, Any]) -> None:
    file.write(_encoded(values))
    file.flush()
    os.fsync(file.fileno())


def _may_be_image(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in _SUFFIXES:
        return True
    with suppress(OSError), open(path, "rb") as file:
        return is_dicom(file.read(132))
    return False


def _decode_table(data: bytes, name: str) -> str:
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((encoding for mark, encoding in marks.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise RadiographError(f"{name} is not valid {encoding.upper()}: save it as CSV in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # Windows; Excel's CSV (Macintosh)


def _header(text: str, name: str) -> tuple[str, list[str]]:
    """The delimiter and the column names, in lower case."""
    first = text.partition("\n")[0]
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        columns = [" ".join(cell.split()).casefold() for cell in cells]
        if "image" in columns:
            break
    else:
        raise RadiographError(f"{name} has no column image; possible columns are: {', '.join(COLUMNS)}")
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
        text = _decode_table(path.read_bytes(), name).lstrip("\ufeff")
        hint = text[:4].lower() == "sep="  # a line that gives spreadsheet programs the delimiter
        text = text.partition("\n")[2] if hint else text
        delimiter, columns = _header(text, name)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
        next(reader)
        rows = [(reader.line_num + hint, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise RadiographError(f"no such file: {name}; check the path") from None
    except (OSError, ValueError, csv.Error) as error:
        raise RadiographError(f"{name} cannot be read as a table ({error}): save it as CSV in UTF-8") from None
    items = []
    for number, row in rows:
        while len(row) > len(columns) and not row[-1].strip():
            row.pop()
        if len(row) != len(columns):
            raise RadiographError(
                f"{name}, line {number}, has {len(row)} cells for {len(columns)} columns: put text with a "
                f"{'tab' if delimiter == chr(9) else delimiter} in quotes"
            )
        cells = {column: cell.strip() for column, cell in zip(columns, row, strict=True)}
        image, lateral = cells["image"], cells.get("lateral")
        if not image:
            raise RadiographError(f"{name}, line {number}, has no image path: add it, or remove the line")
        if "\0" in image or "\0" in (lateral or ""):
            raise RadiographError(f"{name}, line {number}, has a path with a NUL character: correct it")
        texts = {column: cells.get(column) or None for column in ("indication", "comparison", "view")}
        items.append(
            Item(
                cells.get("id") or image,
                path.parent / _path(image),
                **texts,
                lateral=path.parent / _path(lateral) if lateral else None,
                paths=(image, lateral or ""),
            )
        )
    return items
