"""``cbedge schema``: the JSON Schema of reports."""

import typer


def schema() -> None:
    """Print the JSON Schema of the reports written by --json."""
    from cbedge.outputs import SCHEMA

    typer.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)
