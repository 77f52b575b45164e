"""List the benchmarks; each has its own ``--help``."""

import ast
import re
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Print what there is to run, a line each."""
    table = Table("python -m benchmarks.…", "measures", box=None, title="Benchmarks", title_justify="left")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "typer.Typer(" in text and not path.stem.startswith("_"):
            about = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
            table.add_row(path.stem, re.sub(r"^``[^`]*``(?::| )", "", about).strip())
    Console().print(table)
    typer.echo("Each has options of its own: python -m benchmarks.NAME --help")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--help"]):
        typer.echo(f"benchmarks: unknown arguments; type python -m benchmarks.{sys.argv[1][:40]} --help", err=True)
        sys.exit(2)
    main()
