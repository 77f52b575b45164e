"""The command line: parse, call, print."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cbedge import __version__
from cbedge.errors import CbedgeError, OutputError

app = typer.Typer(
    help="Draft chest radiograph reports on one workstation, offline. Research use; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model bundle [default: embedded].")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cbedge {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    image: Annotated[Path, typer.Argument(help="Frontal chest radiograph: PNG, JPEG, TIFF or DICOM (CR, DX).")],
    indication: Annotated[str | None, typer.Option(help='Why the study was requested, such as "cough".')] = None,
    comparison: Annotated[str | None, typer.Option(help="What earlier study it is compared with.")] = None,
    view: Annotated[str | None, typer.Option(help="frontal or lateral [default: what the file says].")] = None,
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model [default: the model's own].")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with timings and provenance.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a new file instead.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --output replace a file.")] = False,
) -> None:
    """Draft the report of one radiograph."""
    from cbedge.report import DRAFT_STATEMENT, format_sections

    if output is not None:
        _check_output(output, force)
    # Loading the radiograph first: a wrong path is told before the model is loaded.
    from cbedge.prompt import ClinicalContext
    from cbedge.radiograph import load_radiograph

    ClinicalContext(indication, comparison, view)
    radiograph = load_radiograph(image)
    from cbedge.generator import ReportGenerator

    generator = ReportGenerator.from_pretrained(model, variant, device)
    stream = generator.stream(
        radiograph, indication=indication, comparison=comparison, view=view, max_new_tokens=max_new_tokens
    )
    live = sys.stdout.isatty() and not as_json and output is None
    for piece in stream:
        if live:
            typer.echo(piece.replace(" IMPRESSION", "\n\nIMPRESSION"), nl=False)
            sys.stdout.flush()
    report = stream.report
    if live:
        typer.echo(f"\n\n[{DRAFT_STATEMENT}]")
    else:
        text = report.to_json() if as_json else report.to_text()
        if output is not None:
            _write(output, text + "\n", force)
        else:
            typer.echo(text)
    if not report.complete:
        typer.echo(f"note: cut off after {report.new_tokens} tokens; raise --max-new-tokens for more", err=True)
    if not format_sections(report.text):
        typer.echo("note: the model wrote nothing for this radiograph", err=True)


@app.command("model")
def model_command(
    model: Model = None,
    card: Annotated[bool, typer.Option("--card", help="Print the whole model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Say which model is embedded, and verify every file of it."""
    from cbedge.bundle import CARD, MANIFEST, open_bundle

    bundle = open_bundle(model)
    if card or as_json:
        bundle.verify((CARD,))
        typer.echo((bundle.folder / (CARD if card else MANIFEST)).read_text(encoding="utf-8"), nl=False)
        return
    bundle.verify()
    manifest = bundle.manifest
    typer.echo(f"{manifest.name} {manifest.version} ({manifest.license})")
    for name, variant in manifest.variants.items():
        size = sum(manifest.files[file].size for file in bundle.variant_files(variant))
        default = ", default" if name == manifest.default_variant else ""
        typer.echo(f"  {name}: {variant.description}, {size / 1e6:.1f} MB{default}")
    for base in manifest.base_weights:
        typer.echo(f"  from {base['origin']} ({base['licence']})")
    for data in manifest.training_data:
        typer.echo(f"  trained on {data['name']} ({data['licence']})")
    for row, scores in manifest.quality.get("scores", {}).items():
        typer.echo(f"  {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    typer.echo(f"{len(manifest.files)} files verified (SHA-256) in {bundle.folder}")
    typer.echo("The whole card: cbedge model --card")


def main() -> NoReturn:
    """Run the command line; an expected failure is one line on standard error and its exit code."""
    try:
        app()
    except CbedgeError as error:
        typer.echo(f"cbedge: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader went away, as with `| head`
        sys.stderr.close()
        sys.exit(141)
    except MemoryError:
        typer.echo("cbedge: not enough memory for this radiograph and model: close programs or scale it down", err=True)
        sys.exit(1)
    sys.exit(0)


def _check_output(output: Path, force: bool) -> None:
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give a file")
    if output.exists() and not force:
        raise OutputError(f"{output} exists already: give --force to replace it, or another name")
    if not output.parent.is_dir():
        raise OutputError(f"no such folder: {output.parent}; make it, or give another path")


def _write(output: Path, text: str, force: bool) -> None:
    import os
    import tempfile

    try:
        handle, partial = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(partial, output)
            else:
                os.link(partial, output)  # fails where the file has come to be meanwhile
                os.unlink(partial)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except FileExistsError:
        raise OutputError(f"{output} exists already: give --force to replace it, or another name") from None
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from None


if __name__ == "__main__":
    main()
