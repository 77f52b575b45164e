"""Draft the reports of many radiographs: one JSON line each, resumable after any interruption.

A line is written whole and synced before the next radiograph is begun. What a killed run left of its last line is cut
off when it goes on, so nothing is lost but the drafts in the making, and nothing is written twice.
"""

from __future__ import annotations

import csv
import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from cbedge.errors import CbedgeError, OutputError, RadiographError
from cbedge.generator import ReportGenerator

COLUMNS = ("image", "id", "indication", "comparison", "view", "lateral")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ""})
_MAX_CSV_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Item:
    """One radiograph to be drafted.

    Attributes:
        id: what it is called in the output: the table's ``id``, or its path below what was given.
        image: its file.
        indication, comparison, view: as of :meth:`ReportGenerator.generate`.
        lateral: file of the same study's lateral radiograph.
    """

    id: str
    image: Path
    indication: str | None = None
    comparison: str | None = None
    view: str | None = None
    lateral: Path | None = None


@dataclass
class Tally:
    """What a run did: drafts written, items that were there already, and why others failed, now or before, as
    (id, message)."""

    written: int
    skipped: int
    failed: list[tuple[str, str]]


def find_items(studies: str) -> list[Item]:
    """The radiographs that a folder (with its subfolders), a pattern such as ``films/*.png``, a file or a table names.

    A table is a ``.csv`` with a column ``image`` (paths relative to the table's folder) and, where known, ``id``,
    ``indication``, ``comparison``, ``view`` and ``lateral`` (a path too).

    Raises:
        RadiographError: nothing is found, two items share a name, or a table cannot be read.
    """
    path = Path(studies)
    if path.is_dir():
        items = [Item(str(f.relative_to(path)), f) for f in sorted(path.rglob("*")) if _may_be_image(f)]
    elif path.suffix.lower() == ".csv":
        items = _read_table(path)
    else:
        names = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(studies, recursive=True))]
        items = [Item(str(name), name) for name in names if name.is_file()]
    if not items:
        raise RadiographError(f"no radiograph at {studies!r}: give a folder, a pattern, a file or a .csv table")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise RadiographError(f"{studies} names {item.id!r} twice: give every radiograph an id of its own")
        seen.add(item.id)
    return items


# Drafts items, in any order: each with the values of its line.
Engine = Callable[[Iterable[Item]], Iterator[tuple[Item, dict[str, Any]]]]


def local_engine(
    generator: ReportGenerator, max_new_tokens: int | None, accept_any_image: bool, together: int = 1
) -> Engine:
    """Draft in this process, so many radiographs at a time; see :meth:`ReportGenerator.generate_many`."""

    def draft_all(items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        waiting = iter(items)
        while some := list(islice(waiting, together)):
            yield from zip(some, _draft_some(some, generator, max_new_tokens, accept_any_image), strict=True)

    return draft_all


def ray_engine(
    model: Path | None, variant: str | None, device: str, max_new_tokens: int | None, accept_any_image: bool,
    workers: int | None = None, template: str | None = None,
) -> Engine:  # fmt: skip
    """Draft on a Ray cluster (the one that ``RAY_ADDRESS`` names, else one started here), a generator in every worker.

    Images and the bundle must be at the same paths on all of its machines.

    Args:
        model, variant, device: as of :meth:`ReportGenerator.from_pretrained`.
        max_new_tokens, accept_any_image: as of :meth:`ReportGenerator.generate`.
        workers: how many; default is one for every two of the cluster's CPUs.
        template: that every draft keeps to, see :meth:`ReportGenerator.keep_to`.

    Raises:
        OutputError: Ray is not installed.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise OutputError("--engine ray needs the package ray; type: pip install ray") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)

    class Worker:
        def __init__(self) -> None:
            self.generator = ReportGenerator.from_pretrained(model, variant, device, threads=2 if count > 1 else None)
            if template is not None:
                self.generator.keep_to(template)

        def draft(self, item: Item) -> tuple[Item, dict[str, Any]]:
            return item, _draft_some([item], self.generator, max_new_tokens, accept_any_image)[0]

    def draft_all(items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        remote = ray.remote(num_cpus=1)(Worker)
        pool = ActorPool([remote.remote() for _ in range(count)])
        yield from pool.map_unordered(lambda worker, item: worker.draft.remote(item), list(items))  # type: ignore[misc, arg-type]

    return draft_all


def run_batch(
    items: Sequence[Item], out: Path, model: str, engine: Engine, retry_failed: bool = False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:  # fmt: skip
    """Draft every item that ``out`` does not hold yet, and add a line for each.

    Args:
        items: see :func:`find_items`.
        out: JSON lines; a file that an earlier run began is gone on with.
        model: name, version and variant of the model (and what else drafts hang on); one file holds drafts of one.
        engine: writes the drafts.
        retry_failed: try again what failed before; its old lines are taken out.
        progress: is told after every item.

    Raises:
        OutputError: ``out`` is something else, was begun with another model, or cannot be written.
    """
    try:
        done = _open_lines(out, model, retry_failed)
        tally = Tally(0, 0, [])
        with open(out, "ab") as file:
            _lock(file, out)
            for item in items:
                if item.id in done:
                    tally.skipped += 1
                    if (error := done[item.id]) is not None:
                        tally.failed.append((item.id, error))
                    progress(tally)
            for item, line in engine(item for item in items if item.id not in done):
                if line["status"] == "ok":
                    tally.written += 1
                else:
                    tally.failed.append((item.id, line["error"]))
                _append(file, {"id": item.id, "batch_model": model, **line})
                progress(tally)
    except OSError as error:
        raise OutputError(
            f"cannot write {out.name}: {error.strerror}; what was written is kept, run it again to go on"
        ) from None
    return tally


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a batch's output; one that a killed run left unfinished is passed over.

    Raises:
        OutputError: the file holds something else.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
                _ = values["id"], values["batch_model"], values["status"]
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{path.name}, line {number}, was not written by cbedge batch: give another --out"
                ) from None
            yield values


def write_parquet(lines: Path, target: Path) -> None:
    """Write a finished batch as one Parquet table, nested values as JSON text.

    Raises:
        OutputError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow; type: pip install pyarrow") from None
    rows = [
        {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in line.items()} for line in read_lines(lines)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    partial = target.with_name(f".{target.name}.partial")
    try:
        pyarrow.parquet.write_table(table, partial)
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write {target.name}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _draft_some(
    items: Sequence[Item], generator: ReportGenerator, max_new_tokens: int | None, accept_any_image: bool
) -> list[dict[str, Any]]:
    requests = [
        {"image": item.image, "indication": item.indication, "comparison": item.comparison, "view": item.view,
         "lateral": item.lateral, "max_new_tokens": max_new_tokens, "accept_any_image": accept_any_image}
        for item in items
    ]  # fmt: skip
    try:
        drafts = generator.generate_many(requests)
    except MemoryError:
        if len(items) == 1:
            name = items[0].image.name
            return [{"status": "failed", "error": f"{name} needs more memory than there is: scale it down"}]
        return [_draft_some([item], generator, max_new_tokens, accept_any_image)[0] for item in items]
    return [
        {"status": "failed", "error": str(draft)} if isinstance(draft, CbedgeError)
        else {"status": "ok", **json.loads(draft.to_json())}
        for draft in drafts
    ]  # fmt: skip


def _open_lines(out: Path, model: str, retry_failed: bool) -> dict[str, str | None]:
    """Ids that need no draft any more, each with why it failed, or ``None``; the file then ends with a whole line."""
    if not out.exists():
        if not out.parent.is_dir():
            raise OutputError(f"no such folder: {out.parent}; make it, or give another --out")
        return {}
    if out.is_dir():
        raise OutputError(f"{out} is a folder; give a file such as reports.jsonl")
    lines = list(read_lines(out))
    other = next((line["batch_model"] for line in lines if line["batch_model"] != model), None)
    if other is not None:
        raise OutputError(f"{out.name} was begun with {other}, this is {model}: give that model, or another --out")
    kept = [line for line in lines if line["status"] == "ok" or not retry_failed]
    if len(kept) < len(lines):
        partial = out.with_name(f".{out.name}.partial")
        with open(partial, "wb") as file:
            for line in kept:
                _append(file, line)
        os.replace(partial, out)
    else:
        _cut_unfinished(out)
    return {line["id"]: line.get("error") if line["status"] == "failed" else None for line in kept}


def _cut_unfinished(out: Path) -> None:
    with open(out, "rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        position = content_end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            at = file.read(position - start).rfind(b"\n")
            if at >= 0:
                file.truncate(start + at + 1)
                return
            position = start
        file.truncate(0)


def _append(file: IO[bytes], values: dict[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[bytes], out: Path) -> None:
    """Two runs on one file would draft everything twice."""
    try:
        import fcntl
    except ImportError:  # Windows: there a file that is open elsewhere can be written too; the user is trusted
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another cbedge batch is writing {out.name}: wait for it, or give another --out") from None


def _may_be_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in _SUFFIXES and not path.name.startswith((".", "DICOMDIR"))


def _read_table(path: Path) -> list[Item]:
    try:
        if path.stat().st_size > _MAX_CSV_BYTES:
            raise RadiographError(f"{path.name} is larger than {_MAX_CSV_BYTES // 2**20} MB: split it")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            rows = list(reader)
    except FileNotFoundError:
        raise RadiographError(f"no such file: {path.name}; check the path") from None
    except (OSError, ValueError, csv.Error) as error:
        raise RadiographError(f"{path.name} cannot be read as a table ({error}): save it as CSV in UTF-8") from None
    if "image" not in columns:
        raise RadiographError(f"{path.name} has no column image; its columns may be: {', '.join(COLUMNS)}")
    items = []
    for number, row in enumerate(rows, 2):
        image = (row.get("image") or "").strip()
        if not image:
            raise RadiographError(f"{path.name}, line {number}, names no image: fill it in, or take the line out")
        told = {name: (row.get(name) or "").strip() or None for name in ("indication", "comparison", "view")}
        lateral = (row.get("lateral") or "").strip()
        items.append(
            Item((row.get("id") or "").strip() or image, path.parent / image, **told,
                 lateral=path.parent / lateral if lateral else None)
        )  # fmt: skip
    return items
