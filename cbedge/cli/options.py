"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model bundle.", show_default="embedded")]

Template = Annotated[
    Path | None,
    typer.Option(help="Text file with your normal report, whose wording drafts follow.", show_default="the model's"),
]

NoTemplate = Annotated[
    bool, typer.Option("--no-template", help="Follow no template: the language model chooses every word.")
]
