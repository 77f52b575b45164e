"""Records of measurements as JSON and Markdown, and the drafts that ``evaluate --drafts`` writes."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_record(record: dict[str, Any], markdown: str, stem: Path) -> None:
    """Write a record and its tables as ``<stem>.json`` and ``<stem>.md``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown, encoding="utf-8")


def origin(record: dict[str, Any]) -> str:
    """Where a record's figures come from (:func:`cbedge.provenance.provenance`), in one line."""
    bundle = record["bundle"]
    model = f"{bundle['name']} {bundle['version']} (SHA-256 {bundle['sha256'][:12]}…)" if bundle else "no bundle"
    when = record["machine"]["date"]
    return f"{when}; {record['data']}; {model}; commit {record['commit']}. Command: `{record['command']}`"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |".replace("|  |", "| |") for line in lines]


def read_drafts(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file of ``evaluate --drafts``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not what ``evaluate --drafts`` writes.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            _ = row["study_id"], row["findings"], row["impression"], row["tags"], next(iter(row["drafts"]))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ValueError(f"{path}, line {number}: not a line of evaluate --drafts ({error})") from None
        rows.append(row)
    return rows


def drafts_of(path: Path, rows: Sequence[dict[str, Any]], name: str | None) -> tuple[str, list[str]]:
    """The name and the drafts of one row of the table; ``None`` for the first.

    Raises:
        ValueError: the file has no drafts, or none of this name.
    """
    if not rows:
        raise ValueError(f"{path} has no drafts")
    name = name or next(iter(rows[0]["drafts"]))
    for row in rows:
        if name not in row["drafts"]:
            raise ValueError(f"{path} has no drafts of {name!r}; it has: {', '.join(row['drafts'])}")
    return name, [row["drafts"][name] for row in rows]
