"""Records of ``cbedge bench`` as table, CSV, Markdown, JSON and plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from cbedge.errors import OutputError
from cbedge.report import Timings

FORMATS = ("table", "json", "csv", "md")
STAGES = tuple(f.name for f in fields(Timings))


def render(record: dict[str, Any], form: str, before: dict[str, Any] | None = None) -> str:
    """Format a record as ``json``, ``csv``, ``md`` or ``table``, compared with the older record ``before`` if given."""
    if form == "json":
        return json.dumps(record, indent=1)
    rows = _table(record, before)
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue().rstrip("\n")
    if form == "md":
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([f"{_title(record)}\n", head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *body])
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=_title(record), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=max(100, 30 + 24 * len(rows[0]))).print(table)
    return out.getvalue().rstrip("\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read an older record.

    Raises:
        OutputError: the file was not written by ``cbedge bench --format json``.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = [row["ms"]["total"]["median"] for row in record["variants"]], record["machine"]["processor"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} was not written by cbedge bench --format json ({type(error).__name__}): give such a file"
        ) from None
    return record


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot the median time of each stage and variant as a PNG.

    Raises:
        OutputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise OutputError("a plot needs matplotlib; type: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["variants"]
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.6 * len(rows)))
    left = np.zeros(len(rows))
    for stage in STAGES[:-1]:
        widths = np.array([row["ms"][stage]["median"] for row in rows])
        axes.barh([row["variant"] for row in rows], widths, left=left, label=stage)
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel="ms, median", title=_title(record).split(". ")[0])
    axes.legend(ncols=len(STAGES) - 1, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _table(record: dict[str, Any], before: dict[str, Any] | None) -> list[list[str]]:
    old = {row["variant"]: row for row in (before or {}).get("variants", ())}
    rows = [["", *(f"{row['variant']}, {row['device']}" for row in record["variants"])]]

    def add(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        rows.append([title, *(cell(row) for row in record["variants"])])

    for stage in (*STAGES[:-1], "first token", "total"):
        rows.append([f"{stage}, ms", *(_cell(row, old.get(row["variant"]), stage) for row in record["variants"])])
    if any("redraft_ms" in row for row in record["variants"]):
        add("total, same study again, ms", lambda row: _or_dash(row["redraft_ms"]["median"], "{:.1f}"))
    add("tokens/s while decoding", lambda row: f"{row['tokens_per_second']['median']:.0f}")
    add("prompt tokens, new tokens", lambda row: f"{row['prompt_tokens']:.0f}, {row['new_tokens']:.0f}")
    add("tokens per pass (guesses accepted)", _guessing)
    add("MB read per pass", lambda row: f"{row['bytes_per_pass'] / 1e6:.1f}")
    add("share of memory bandwidth", lambda row: _or_dash(row["bandwidth_share"], "{:.0%}"))
    add("loading, s", lambda row: f"{row['load_s']:.2f}")
    add("peak memory, MB", lambda row: f"{row['peak_memory_mb']:.0f}")
    if any(row["gpu_memory_mb"] for row in record["variants"]):
        add("GPU memory, MB", lambda row: _or_dash(row["gpu_memory_mb"], "{:.0f}"))
    if cold := record.get("cold"):
        rows.append(["cold start of the command, s", f"{cold['command_s']:.2f}", *[""] * (len(rows[0]) - 2)])
        rows.append(["cold start, peak memory, MB", f"{cold['peak_memory_mb']:.0f}", *[""] * (len(rows[0]) - 2)])
    return rows


def _cell(row: dict[str, Any], old: dict[str, Any] | None, stage: str) -> str:
    percentiles = row["ms"][stage]
    text = f"{percentiles['median']:.1f} (p95 {percentiles['p95']:.1f}, p99 {percentiles['p99']:.1f})"
    if old and old["ms"].get(stage, {}).get("median"):
        text += f", {percentiles['median'] / old['ms'][stage]['median']:.2f} x before"
    return text


def _guessing(row: dict[str, Any]) -> str:
    return f"{_or_dash(row['tokens_per_pass'], '{:.2f}')} ({_or_dash(row['guesses_accepted'], '{:.0%}')})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _title(record: dict[str, Any]) -> str:
    where = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    bandwidth = f"{where['read_bandwidth_gb_s']:.0f} GB/s" if where["read_bandwidth_gb_s"] else ""
    parts = [where["processor"], f"{where['cores']} cores", bandwidth, where["gpu"] or "", versions, where["date"]]
    counts = (record["images"], "radiograph"), (record["repeat"], "draft")
    drafts = " x ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    return f"{record['model']}, median of {drafts}. " + ", ".join(filter(None, parts))
