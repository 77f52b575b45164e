"""List the benchmarks; each has its own ``--help``."""

import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from export.console import programs


def main() -> None:
    """Print the name of each benchmark and what it measures."""
    table = Table("python -m benchmarks.…", "measures", box=None, title="Benchmarks", title_justify="left")
    for name, about in programs(Path(__file__).parent).items():
        table.add_row(name, about)
    Console().print(table)
    typer.echo("Each has options of its own: python -m benchmarks.NAME --help")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--help"]):
        typer.echo(f"benchmarks: unknown arguments; type python -m benchmarks.{sys.argv[1][:40]} --help", err=True)
        sys.exit(2)
    main()
