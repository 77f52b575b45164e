"""``cbedge schema``: the JSON Schemas of reports and of batches."""

from typing import Annotated

import typer


def schema(
    batch: Annotated[bool, typer.Option("--batch", help="Print the schema of a line of cbedge batch instead.")] = False,
) -> None:
    """Print the JSON Schema of the reports that --format json writes."""
    import json

    from cbedge.outputs import BATCH_SCHEMA, SCHEMA

    text = SCHEMA.read_text(encoding="utf-8")
    if batch:
        report, line = json.loads(text), json.loads(BATCH_SCHEMA.read_text(encoding="utf-8"))
        draft = line["oneOf"][0]  # a line with a draft has all keys of a report
        draft |= {"required": report["required"], "properties": {**report["properties"], **draft["properties"]}}
        text = json.dumps(line, indent=2) + "\n"
    typer.echo(text, nl=False)
