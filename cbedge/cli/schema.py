"""``cbedge schema``: the json schema of reports."""

import typer


def schema() -> None:
    """Print the JSON Schema of the reports that --json writes."""
    from cbedge.outputs import SCHEMA

    typer.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)
