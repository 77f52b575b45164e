"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model bundle.", show_default="embedded")]

Template = Annotated[
    Path | None,
    typer.Option(help="Text file: a normal report in your words, which drafts keep to.", show_default="the usual one"),
]
