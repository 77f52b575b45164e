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

Variant = Annotated[
    str | None, typer.Option(help="Variant of the model, such as int4.", show_default="chosen for this machine")
]

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

MaxNewTokens = Annotated[int | None, typer.Option(help="Maximum length of a draft in tokens.", show_default="model's")]

AcceptAnyImage = Annotated[
    bool, typer.Option("--accept-any-image", help="Also draft from images that do not look like a chest radiograph.")
]
