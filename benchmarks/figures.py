"""Write the figures of README and docs from the records in `benchmarks/results/`, or check that they are the same.

A page has three kinds of places, between comments that a reader does not see:

- `figure: RECORD PATH FORMAT`: one value, such as `iu_xray_mini scores/q4a8 (cbedge)/CIDEr .3`;
- `table: NAME`: a table of `benchmarks/figures.yaml`;
- `records`: where the figures of the page come from, and which are of another bundle than the embedded one.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.common import ROOT
from cbedge.bundles.bundle import DEFAULT_BUNDLE
from cbedge.provenance import describe_bundle
from training.command_line import run
from training.records import table

RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- (figure|table|records)(?:: ([^>]*?))? -->)(.*?)(<!-- /\2 -->)", re.S)
_VALUE = re.compile(r"\{([^{}|]+)\|([^{}|]+)\}")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may quote figures."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


class Records:
    """The records of a folder, and those that the page at hand has used."""

    def __init__(self, folder: Path, embedded: dict[str, str]):
        self.folder, self.embedded = folder, embedded
        self.used: dict[str, dict[str, Any]] = {}

    def value(self, name: str, path: str, form: str) -> str:
        """A value of a record in a format: Python's, or ``.3`` for a score without the zero before its point."""
        if name not in self.used:
            self.used[name] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        found: Any = self.used[name]
        for key in path.split("/"):
            if found is None:  # not measured
                return ""
            try:
                found = found[int(key) if isinstance(found, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"{name}.json has no {path!r} (at {key!r}): correct the page or the table") from None
        if found is None or (isinstance(found, float) and math.isnan(found)):  # not measured
            return ""
        if re.fullmatch(r"\.\d", form):
            return re.sub(r"^(-?)0\.", r"\1.", format(found, f"{form}f"))
        return format(found, form)

    def fill(self, name: str, template: str) -> str:
        """A template with each ``{PATH|FORMAT}`` replaced; empty if none of its values was measured."""
        values = [self.value(name, *found.groups()) for found in _VALUE.finditer(template)]
        filling = iter(values)
        return _VALUE.sub(lambda _: next(filling), template) if any(values) or not values else ""

    def rows(self, settings: dict[str, Any]) -> list[str]:
        """The lines of a table of ``figures.yaml``."""
        columns, rows = settings["columns"], []
        for label, row in settings["rows"].items():
            name, key = row if isinstance(row, list) else (settings["record"], row)
            cells = (self.fill(name, cell.replace("ROW", key)) for cell in columns.values())
            rows.append((label, *cells))
        return table(("", *columns), rows)

    def origins(self) -> str:
        """Where the figures that were used come from, in one paragraph."""
        return "Records in `benchmarks/results/`: " + "; ".join(map(self._origin, sorted(self.used))) + "."

    def _origin(self, name: str) -> str:
        record = self.used[name]
        when = record.get("machine", {}).get("date") or record.get("date", "no date")
        if record.get("commit"):
            when += f", commit {record['commit'][:12]}"
        if "bundle" not in record:
            return f"`{name}` ({when}; an older record of {record.get('model', 'a model that it does not name')})"
        if record["bundle"] is None:
            return f"`{name}` ({when}; no bundle)"
        same = record["bundle"]["sha256"] == self.embedded["sha256"]
        other = f"another bundle than the embedded one, {record['bundle']['version']} {record['bundle']['sha256'][:8]}"
        return f"`{name}` ({when}; {'the embedded bundle' if same else other})"


def filled(text: str, records: Records, tables: dict[str, Any]) -> str:
    """A page with the figures of the records.

    Raises:
        ValueError: a place is not valid, or a page with figures does not say where they come from.
    """
    records.used = {}

    def write(place: re.Match[str]) -> str:
        begin, kind, words, content, end = place.groups()
        if kind == "figure":
            name, _, rest = words.partition(" ")
            content = records.value(name, *rest.rsplit(" ", 1))
        elif kind == "table":
            content = "\n".join(["\n", *records.rows(tables[words]), "\n"])
        return f"{begin}{content}{end}"

    text = _PLACE.sub(write, text)
    if records.used and "<!-- records -->" not in text:
        raise ValueError("it quotes figures and does not say of which bundle: add <!-- records --><!-- /records -->")
    begin, content, end = "<!-- records -->", f"\n\n{records.origins()}\n\n", "<!-- /records -->"
    return re.sub(f"{begin}.*?{end}", lambda _: begin + content + end, text, flags=re.S)


@app.command(help=__doc__)
def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if a page differs.")] = False,
) -> None:
    """Write or check every page."""
    records = Records(RESULTS, describe_bundle(DEFAULT_BUNDLE))
    tables = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    wrong = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        try:
            after = filled(before, records, tables)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{page.relative_to(ROOT)}: {error}") from None
        if after != before:
            wrong.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after, encoding="utf-8")
    typer.echo(f"{'differ from their records' if check else 'written'}: {', '.join(wrong) or 'none'}")
    if check and wrong:
        raise ValueError("type python -m benchmarks.figures, and read the diff")


if __name__ == "__main__":
    run(app)
