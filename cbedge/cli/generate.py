"""``cbedge generate``: draft one report."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbedge.cli.options import (
    AcceptAnyImage,
    Device,
    MaxNewTokens,
    Model,
    NoTemplate,
    OperatingPoint,
    Template,
    Unassessed,
    Variant,
    written_file,
)
from cbedge.cli.terminal import print_error, read_text_file
from cbedge.errors import OptionError, OutputError
from cbedge.files import check_distinct, check_output, write_output
from cbedge.prompt import VIEW_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def generate(
    image: Annotated[Path, typer.Argument(help="Chest radiograph: PNG, JPEG, TIFF, WebP or DICOM (CR, DX).")],
    indication: Annotated[str | None, typer.Option(help='Reason for the study in English, such as "cough".')] = None,
    comparison: Annotated[str | None, typer.Option(help='Prior study to compare with, such as "2019".')] = None,
    view: Annotated[str | None, typer.Option(help=f"{VIEW_NAMES}.", show_default="from the header")] = None,
    template: Template = None,
    no_template: NoTemplate = False,
    lateral: Annotated[Path | None, typer.Option(help="Lateral radiograph of the same study.")] = None,
    model: Model = None,
    variant: Variant = None,
    device: Device = "auto",
    operating_point: OperatingPoint = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    beams: Annotated[int, typer.Option(help="Number of beams; above 1 turns on beam search.")] = 1,
    no_repeat: Annotated[
        int | None,
        typer.Option(help="Never repeat an n-gram of this many tokens; 0 allows repeats.", show_default="the model's"),
    ] = None,
    stop_bias: Annotated[
        float | None, typer.Option(help="Below 0: longer drafts; above 0: shorter drafts.", show_default="the model's")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="text, json, sr or fhir.", show_default="text")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    accept_any_image: AcceptAnyImage = False,
    unassessed: Unassessed = "mark",
    output: Annotated[
        Path | None, written_file("Write to this file instead of standard output.", "--output", "-o")
    ] = None,
    heatmap: Annotated[Path | None, written_file("Also write a heat map of the model's attention to this PNG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of --output and --heatmap.")] = False,
) -> None:
    """Draft the report of one study."""
    from cbedge.outputs import check_format, check_source, render
    from cbedge.report import format_sections

    form = form or ("json" if as_json else "text")
    check_format(form)
    if as_json and form != "json":
        raise OptionError(f"--json and --format {form} cannot be combined: give one of them")
    sources = [path for path in (image, lateral, template) if path is not None]
    _check_outputs(form, output, heatmap, force, sources)
    # All input is checked before the model is loaded, so that an error appears at once.
    from cbedge.decoding import Decoding
    from cbedge.drafting.assessment import check_shown_as
    from cbedge.images.radiograph import load_radiograph
    from cbedge.prompt import ClinicalContext

    ClinicalContext(indication, comparison, view)
    check_shown_as(unassessed)
    if template and no_template:
        raise OptionError("--template and --no-template cannot be combined: give one of them")
    wording = read_text_file(template) if template else None
    if wording is not None:
        from cbedge.drafting.template_parser import parse_template

        parse_template(wording)
    chosen: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "beams": beams,
        "keep_to_template": not no_template,
    }
    chosen |= {k: v for k, v in (("no_repeat", no_repeat), ("stop_bias", stop_bias)) if v is not None}
    Decoding(**chosen)  # checks the values
    radiograph, second = load_radiograph(image), load_radiograph(lateral) if lateral else None
    check_source(form, image)
    from cbedge.api import ReportGenerator

    generator = ReportGenerator.from_pretrained(model, variant, device, operating_point=operating_point)
    stream = generator.stream(
        radiograph,
        indication=indication,
        comparison=comparison,
        view=view,
        template=wording,
        lateral=second,
        max_new_tokens=max_new_tokens,
        decoding=replace(generator.decoding, **chosen),
        accept_any_image=accept_any_image,
        unassessed=unassessed,
    )
    live = sys.stdout.isatty() and form == "text" and output is None
    for word in _words(stream):
        if live:
            typer.echo(word.replace(" IMPRESSION:", "\n\nIMPRESSION:"), nl=False)
            sys.stdout.flush()
    report = stream.report
    if heatmap is not None:
        from cbedge.images.heatmap import overlay, png

        write_output(heatmap, png(overlay(radiograph, stream.attention)), force, sources)
    if live:  # the text is on the terminal; the notes follow
        typer.echo(report.to_text().removeprefix(format_sections(report.text)))
    elif output is not None:
        write_output(output, render(report, form, image), force, sources)
    else:
        sys.stdout.buffer.write(render(report, form, image))
        sys.stdout.flush()
    if heatmap is not None:
        from cbedge.images.heatmap import CAVEAT

        print_error(f"heat map: {heatmap}. {CAVEAT}")
    if not report.complete:
        where = f"by --max-new-tokens {max_new_tokens}" if max_new_tokens else "at its maximum length"
        empty = "" if report.text else ", before the end of its first sentence, so it is empty"
        print_error(f"note: the draft was cut off {where}{empty}; raise --max-new-tokens for a longer one")


def _words(pieces: Iterable[str]) -> Iterator[str]:
    """Join the pieces of a stream, which are tokens, to words: a heading may be several tokens."""
    word = ""
    for piece in pieces:
        if piece.startswith(" "):
            yield word
            word = ""
        word += piece
    yield word


def _check_outputs(form: str, output: Path | None, heatmap: Path | None, force: bool, sources: list[Path]) -> None:
    """Check that the draft and the heat map can be written where the user wants them.

    Raises:
        OutputError: they cannot.
    """
    if form == "sr" and output is None and sys.stdout.isatty():
        raise OutputError("a DICOM SR is binary and cannot be shown in a terminal: give --output FILE, or use a pipe")
    for target in filter(None, (output, heatmap)):
        check_output(target, force, sources)
    check_distinct({"--output": output, "--heatmap": heatmap})
    if output is None and sys.__stdout__ is None:
        raise OutputError("standard output is closed: give --output FILE")
