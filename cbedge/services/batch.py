"""Draft the reports of many radiographs, one JSON line each; a run can be resumed after any interruption.

Each line is written and synced before the next radiograph is started. When a killed run is resumed, its incomplete last
line is removed. So only the current draft is lost, and none is written twice.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbedge.api import ReportGenerator
from cbedge.errors import CbedgeError, OutputError, install_extra, memory_errors
from cbedge.file_names import safe_name
from cbedge.files import check_output, file_sha256, lock_file, lock_path, open_atomically, unlock_file, write_output
from cbedge.images.radiograph import printable
from cbedge.outputs import FORMATS, check_source, render
from cbedge.report import Report
from cbedge.services.studies import Item

_START = b'{"id": '  # start of every output line
_OWNER = ".cbedge-batch"  # file in a folder of documents


@dataclass
class Tally:
    """Result of a run: number of drafts written, number of items that were already done, failures of this or an earlier
    run as (id, message), number of the written drafts that were cut off at the token limit, and number of earlier lines
    of items that this run does not have."""

    written: int
    skipped: int
    failed: list[tuple[str, str]]
    cut_off: int = 0
    left: int = 0


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

    def path(self, item: Item) -> Path:
        """The file of one draft, named after the radiograph: ``a.png.txt``, but ``a.sr.dcm`` for ``a.dcm``."""
        suffix = FORMATS[self.form].suffix
        return self.folder / f"{safe_name(item.id.removesuffix(Path(suffix).suffix))}{suffix}"

    def check(self, items: Iterable[Item], inputs: Iterable[Path], outputs: Iterable[Path] = ()) -> None:
        """Check that no draft would overwrite one of all inputs of the batch or of its other outputs.

        Raises:
            OutputError: a draft would.
        """
        names = {os.path.normcase(os.path.realpath(path)) for path in outputs}
        read = {identity for path in inputs if (identity := _identity(path)) is not None}
        for target in [self.folder / _OWNER, *map(self.path, items)]:
            if _identity(target) in read:
                raise OutputError(
                    f"{printable(str(target))} is an input file, and inputs are never overwritten: give another folder "
                    "for --documents"
                )
            name = os.path.normcase(os.path.realpath(target))
            if name in names:
                raise OutputError(
                    f"{printable(str(target))} is given as two outputs: give another --documents folder, or other ids"
                )
            names.add(name)

    def prepare(self, out: Path, force: bool) -> None:
        """Create the folder, or open the one that the same batch created: a file in it has the path of ``out``.

        Raises:
            OutputError: the folder has files of another origin and ``force`` is false, or it cannot be created.
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
        write_output(self.path(item), content, True, [item.image])


def _identity(path: Path) -> tuple[int, int] | None:
    """Identifies a file under all its names and links; ``None`` if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def draft_item(
    item: Item, generator: ReportGenerator, documents: Documents | None = None, **options: Any
) -> dict[str, Any]:
    """Draft one radiograph with the other fields of a :class:`cbedge.api.DraftRequest`: the values of its line, with
    ``status`` ``ok``, or ``failed`` and ``error``.

    Raises:
        OutputError: a document cannot be written.
    """
    try:
        with memory_errors():
            if documents is not None:
                check_source(documents.form, item.image)
            report = generator.generate(
                item.image,
                indication=item.indication,
                comparison=item.comparison,
                view=item.view,
                lateral=item.lateral,
                **options,
            )
            if documents is not None:
                documents.write(item, report)
    except OutputError:
        raise
    except CbedgeError as error:
        return {"status": "failed", "error": str(error)}
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
        items: see :func:`cbedge.services.studies.find_studies`.
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
            unlock_file(lock)
    except OSError as error:
        raise OutputError(
            f"cannot write {out.name}: {error.strerror}; finished drafts are kept, run the command again to resume"
        ) from None


def _run_locked(
    items: Sequence[Item], out: Path, model: str, draft: Draft, retry_failed: bool, progress: Callable[[Tally], None]
) -> Tally:
    prints = {item.id: item.fingerprint() for item in items}
    done = _open_lines(out, model, retry_failed, {item.id: item for item in items}, prints)
    tally = Tally(0, 0, [], left=len(done.keys() - prints.keys()))
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
                tally.cut_off += not line["complete"]
            else:
                tally.failed.append((item.id, line["error"]))
            file.write(_encoded({"id": item.id, "batch_model": model, "batch_input": prints[item.id], **line}))
            file.flush()
            os.fsync(file.fileno())
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
    """Convert the batch output ``lines``, which is never overwritten, to a Parquet table; nested values become JSON
    text. The other arguments are those of :func:`cbedge.files.write_output`.

    Raises:
        OutputError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError(f"--parquet needs the package pyarrow; type: {install_extra('batch')}") from None
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
            f"{out.name} was started with {other}, but this run uses {model}: use the same options, or another --out"
        )
    kept = {
        line["id"]: line
        for line in lines
        if (line["status"] == "ok" or not retry_failed)
        and _is_current(line, items.get(line["id"]), prints.get(line["id"]))
    }
    if sum(len(_encoded(line)) for line in kept.values()) != out.stat().st_size:
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
        with suppress(OSError):
            if old != new and new is not None and file_sha256(path) != digest:
                return False
    return True


def _encoded(values: dict[str, Any]) -> bytes:
    # File names that are not UTF-8 have lone surrogates; escaped, they are valid JSON and survive a round trip.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
