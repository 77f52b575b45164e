"""Options that several commands share."""

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cbedge.errors import OutputError


def number(least: float, most: float, help: str, **options: Any) -> Any:
    """An option for a finite number from ``least`` to ``most``; also of the other command lines."""
    return typer.Option(min=least, max=most, callback=_check_finite, help=help, **options)


def _check_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):  # NaN is not outside any range
        raise typer.BadParameter("nan is not a number")
    return value


def output_file(text: str) -> Path:
    """The path of an output. A slash at its end, which :class:`Path` drops, would mean a folder.

    Raises:
        OutputError: it names a folder.
    """
    if text.endswith(("/", os.sep)):
        raise OutputError(f"{text} names a folder: give the name of a file")
    return Path(text)


def written_file(help: str, *names: str, **options: Any) -> Any:
    """An option for an output file."""
    return typer.Option(*names, parser=output_file, metavar="<path>", help=help, **options)


Model = Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model bundle.", show_default="embedded")]

Template = Annotated[
    Path | None,
    typer.Option(help="Text file with your normal report, whose wording drafts follow.", show_default="the model's"),
]

NoTemplate = Annotated[
    bool,
    typer.Option(
        "--no-template",
        help="Use no template. The fixed sentences for image findings stay; the language model writes the rest.",
    ),
]

Variant = Annotated[
    str | None, typer.Option(help="Variant of the model, such as int4.", show_default="chosen for this machine")
]

OperatingPoint = Annotated[
    str | None,
    typer.Option(help="Thresholds of the image findings: sensitive, balanced or specific.", show_default="the model's"),
]

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

MaxNewTokens = Annotated[int | None, typer.Option(help="Maximum length of a draft in tokens.", show_default="model's")]

AcceptAnyImage = Annotated[
    bool, typer.Option("--accept-any-image", help="Also draft from images that do not look like a chest radiograph.")
]

Unassessed = Annotated[
    str,
    typer.Option(help="Sentences on what the model does not assess: mark them with *, omit them, or plain."),
]
