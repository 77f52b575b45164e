"""Tables and plots of :mod:`benchmarks.peers`."""

from __future__ import annotations

import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Median seconds, and the ratio to the first runner in the same round: median, least and most."""
    ours = next(iter(runs.values()), None)
    rows = {}
    for name, found in runs.items():
        row: dict[str, Any] = {}
        for part in ("whole", "language"):
            seconds = [run[part] for run in found]
            row[f"{part}_s"] = statistics.median(seconds)
            if ours:
                ratios = [s / o[part] for s, o in zip(seconds, ours, strict=True)]
                row[f"{part}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        row |= _agreement(runs, found)
        rows[name] = row
    return rows


def _agreement(runs: dict[str, list[dict[str, Any]]], found: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median number of characters before a runner first differs from transformers in fp32, and rounds without a
    difference."""
    exact = runs.get("transformers fp32")
    if not exact or not found[0]["text"]:
        return {"same_characters_as_fp32": None, "same_texts_as_fp32": None}
    pairs = [(ours["text"], theirs["text"]) for ours, theirs in zip(found, exact, strict=True)]
    same = [sum(1 for _ in takewhile(lambda at: at[0] == at[1], zip(*pair, strict=False))) for pair in pairs]
    return {"same_characters_as_fp32": statistics.median(same), "same_texts_as_fp32": sum(a == b for a, b in pairs)}


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    where = record["machine"]
    lines = [
        f"# {_title(record)}, {record['rounds']} rounds in turn",
        "",
        f"{where['date']}, {where['gpu'] or where['processor']}, {record['threads']} threads, "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + f". Command: `{record['command']}`",
        "",
        "Seconds are medians. Ratios are to the first row in the same round: median (least to most).",
        "",
        "| | whole report, s | ratio | language model, s | ratio | characters like fp32's (equal texts) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in record["summary"].items():
        cells = []
        for part in ("whole", "language"):
            known = row[f"{part}_s"] == row[f"{part}_s"]
            ratio = row.get(f"{part}_ratio")
            cells.append(f"{row[f'{part}_s']:.3f}" if known else "-")
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) if known and ratio else "-")
        same = row["same_characters_as_fp32"]
        agreed = "-" if same is None else f"{same:.0f} ({row['same_texts_as_fp32']} of {record['rounds']})"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {agreed} |")
    lines += [f"\n{name} did not run: {reason}" for name, reason in record["failed"].items()]
    return "\n".join(lines) + "\n"


def _title(record: dict[str, Any]) -> str:
    """The page's title: what was written."""
    least, middle, most = record["tokens"]
    if least == most:
        return f"One report of {middle:.0f} tokens"
    return f"Reports of {record['rounds']} studies, {least} to {most} tokens, median {middle:.0f}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot the seconds of every runner as a PNG: the whole report, and in front of it the language model."""
    from matplotlib.figure import Figure

    rows = record["summary"]
    figure = Figure(figsize=(9, 1.4 + 0.4 * len(rows)), layout="tight")
    axes = figure.subplots()
    for part, colour, label in (("whole_s", "#c5d5ea", "whole report"), ("language_s", "#2f5d8a", "language model")):
        axes.barh(list(rows), [row[part] for row in rows.values()], color=colour, label=label)
    for at, row in enumerate(rows.values()):
        longest = max(v for v in (row["whole_s"], row["language_s"]) if v == v)
        axes.text(longest, at, f" {longest:.2f}", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="seconds, median", title=f"{_title(record)}, {record['threads']} threads")
    axes.legend(fontsize="small", loc="upper right")
    axes.margins(x=0.1)
    figure.savefig(path, dpi=110)
