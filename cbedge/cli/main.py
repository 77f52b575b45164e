"""The command line: parse, call, print."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cbedge import __version__
from cbedge.errors import CbedgeError, ContextError, DeviceError, OutputError, RadiographError

if TYPE_CHECKING:
    from cbedge.api import ReportGenerator

app = typer.Typer(
    help="Draft chest radiograph reports on one workstation, offline. Research use; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a model bundle.", show_default="embedded")]

Template = Annotated[
    Path | None,
    typer.Option(help="Text file: a normal report in your words, which drafts keep to.", show_default="the usual one"),
]


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
    view: Annotated[str | None, typer.Option(help="frontal or lateral.", show_default="what the file says")] = None,
    template: Template = None,
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Keep to no template: the language model chooses every word.")
    ] = False,
    lateral: Annotated[
        Path | None, typer.Option(help="The same study's lateral radiograph, for a model that reads both.")
    ] = None,
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    beams: Annotated[int, typer.Option(help="Above 1: beam search with so many hypotheses.")] = 1,
    no_repeat: Annotated[
        int | None,
        typer.Option(help="Never write a run of so many tokens twice; 0 allows it.", show_default="the model's"),
    ] = None,
    stop_bias: Annotated[
        float | None, typer.Option(help="Below 0 longer drafts, above 0 shorter ones.", show_default="the model's")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="text, json, sr or fhir.", show_default="text")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    accept_any_image: Annotated[
        bool, typer.Option("--accept-any-image", help="Draft even of what does not look like a chest radiograph.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a new file instead.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Also write a new PNG of where the model looked.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --output and --heatmap replace a file.")] = False,
) -> None:
    """Draft the report of one study."""
    from cbedge.outputs import check_format, render
    from cbedge.report import DRAFT_STATEMENT, format_sections

    form = form or ("json" if as_json else "text")
    check_format(form)
    if as_json and form != "json":
        raise OutputError(f"--json and --format {form} exclude each other: give one of them")
    if form == "sr" and output is None and sys.stdout.isatty():
        raise OutputError("a DICOM SR is no text: give --output FILE, or pipe it on")
    sources = [path for path in (image, lateral, template) if path is not None]
    for target in filter(None, (output, heatmap)):
        _check_output(target, force, sources)
    if output is not None and output == heatmap:
        raise OutputError("--output and --heatmap name one file: give two")
    if output is None and sys.__stdout__ is None:
        raise OutputError("standard output is closed: give --output FILE")
    # Loading the radiograph first: a wrong path is told before the model is loaded.
    from cbedge.decoding import Decoding
    from cbedge.drafting.templates import read_template
    from cbedge.images.radiograph import load_radiograph
    from cbedge.prompt import ClinicalContext

    ClinicalContext(indication, comparison, view)
    if template and no_template:
        raise ContextError("--template and --no-template exclude each other: give one of them")
    wording = read_template(_read_text(template)) if template else None
    chosen: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "beams": beams,
                              "keep_to_template": not no_template}  # fmt: skip
    chosen |= {k: v for k, v in (("no_repeat", no_repeat), ("stop_bias", stop_bias)) if v is not None}
    Decoding(**chosen)  # what is wrong is told before the model is loaded
    radiograph, second = load_radiograph(image), load_radiograph(lateral) if lateral else None
    from cbedge.api import ReportGenerator

    generator = ReportGenerator.from_pretrained(model, variant, device)
    stream = generator.stream(
        radiograph, indication=indication, comparison=comparison, view=view, template=wording, lateral=second,
        max_new_tokens=max_new_tokens, decoding=replace(generator.decoding, **chosen),
        accept_any_image=accept_any_image,
    )  # fmt: skip
    live = sys.stdout.isatty() and form == "text" and output is None
    for piece in stream:
        if live:
            typer.echo(piece.replace(" IMPRESSION", "\n\nIMPRESSION"), nl=False)
            sys.stdout.flush()
    report = stream.report
    if heatmap is not None:
        from cbedge.images.heatmap import CAVEAT, overlay, png

        _write(heatmap, png(overlay(radiograph, stream.attention)), force, sources)
    if live:
        for note in report.notes():
            typer.echo(f"\n\n[{note}]", nl=False)
        typer.echo(f"\n\n[{DRAFT_STATEMENT}]")
    else:
        content = render(report, form, image)
        if output is not None:
            _write(output, content, force, sources)
        else:
            _print(content)
    if heatmap is not None:
        _tell(f"heat map: {heatmap}. {CAVEAT}")
    if not report.complete:
        _tell(f"note: cut off after {report.new_tokens} tokens; raise --max-new-tokens for more")
    if not format_sections(report.text):
        _tell("note: the model wrote nothing for this radiograph")


@app.command("bench")
def bench_command(
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Radiograph, or a folder of them; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Radiographs to take at most.")] = 20,
    model: Model = None,
    variants: Annotated[str | None, typer.Option(help="Comma between names.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one a core")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Times that every radiograph is drafted.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Drafts before any is timed.")] = 2,
    indication: Annotated[str, typer.Option(help="Given with every radiograph.")] = "cough",
    tokens: Annotated[int | None, typer.Option(min=1, help="End every draft after so many tokens.")] = None,
    no_speculative: Annotated[bool, typer.Option("--no-speculative", help="One token a pass.")] = False,
    cold: Annotated[int, typer.Option(min=0, help="Also run the whole command so often in a new process.")] = 0,
    form: Annotated[str, typer.Option("--format", help="table, json, csv or md.")] = "table",
    compare: Annotated[Path | None, typer.Option(help="An older record (--format json), set beside.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the stages; needs matplotlib.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a new file instead.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --output and --plot replace a file.")] = False,
) -> None:
    """Measure on this machine: every stage, memory, tokens a second, share of the memory's bandwidth."""
    from cbedge import bench
    from cbedge.images.radiograph import load_radiograph

    if form not in bench.FORMATS:
        raise OutputError(f"unknown format {form[:20]!r}; give one of: {', '.join(bench.FORMATS)}")
    for target in filter(None, (output, plot)):
        _check_output(target, force)
    before = bench.read_record(compare) if compare else None
    paths = [f for path in image or [] for f in (sorted(path.iterdir()) if path.is_dir() else [path])][:limit]
    if image and not paths:
        raise RadiographError(f"no radiograph in {image[0]}: give a file, or a folder that holds some")
    for path in paths[:1]:
        load_radiograph(path)  # or the first one's time would hold that of importing what reads it
    radiographs = [load_radiograph(path) for path in paths] or [bench.drawn_chest()]
    with _status() as tell:
        record = bench.bench(
            radiographs, model=model, variants=[v for v in (variants or "").split(",") if v], device=device,
            threads=threads, indication=indication, tokens=tokens, warm_up=warm_up, repeat=repeat,
            speculative=not no_speculative, progress=tell,
        )  # fmt: skip
        if cold:
            tell("cold start")
            measured = record["variants"][0]["variant"]
            record["cold"] = bench.cold_start(paths[0] if paths else None, model, measured, cold)
    if plot:
        bench.plot(record, plot)
    text = bench.render(record, form, before)
    if output is not None:
        _write(output, text.encode() + b"\n", force)
    else:
        typer.echo(text)


@app.command("batch")
def batch_command(
    studies: Annotated[str, typer.Argument(help="Folder, pattern, file, or .csv with image, id, indication...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines; a file that was begun is gone on with.")],
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop every draft after so many tokens.")] = None,
    template: Template = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    accept_any_image: Annotated[
        bool, typer.Option("--accept-any-image", help="Draft even of what does not look like a chest radiograph.")
    ] = False,
    parquet: Annotated[Path | None, typer.Option(help="Also write a new Parquet table; needs pyarrow.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --parquet replace a file.")] = False,
) -> None:
    """Draft the reports of many radiographs; run it again to go on after an interruption."""
    import hashlib
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cbedge.images.radiograph import printable
    from cbedge.services import batch

    found = batch.find_studies(studies)
    items = [replace(item, image=item.image.absolute()) for item in found.items]
    for kind, names in (("files that are no radiographs were skipped", found.skipped),
                        ("folders could not be read", found.unreadable)):  # fmt: skip
        if names:
            more = ", ..." if len(names) > 5 else ""
            _tell(f"{len(names)} {kind}: {', '.join(map(printable, names[:5]))}{more}")
    inputs = [path for item in items for path in (item.image, item.lateral) if path is not None]
    inputs += [Path(studies), *([template] if template else [])]
    _check_not_input(out, inputs)
    if parquet is not None:
        _check_output(parquet, force, [*inputs, out])
        if os.path.realpath(parquet) == os.path.realpath(out):
            raise OutputError("--parquet and --out name one file: give two")
    from cbedge.api import ReportGenerator
    from cbedge.backends import choose_variant
    from cbedge.bundles.bundle import open_bundle
    from cbedge.drafting.codec import TextCodec
    from cbedge.drafting.plan import check_template

    bundle = open_bundle(model)
    name, device = choose_variant(bundle, variant, device)
    wording = None if template is None else check_template(bundle.manifest, _read_text(template), TextCodec(bundle))
    generator = _keeping(ReportGenerator.from_pretrained(model, variant, device), template)

    def draft(item: batch.Item) -> dict[str, Any]:
        return batch.draft_item(item, generator, max_new_tokens, accept_any_image)

    drafted_by = f"{bundle.manifest.name} {bundle.manifest.version} {name}"
    if wording is not None:
        drafted_by += f" template {hashlib.sha256(wording.encode()).hexdigest()[:8]}"
    columns = (TextColumn("drafting"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(items))
        tally = batch.run_batch(items, out, drafted_by, draft, retry_failed, progress=lambda tally: bar.advance(task))
    if parquet is not None:
        batch.write_parquet(out, parquet, force, inputs)
    skipped = f", {tally.skipped} were there already" if tally.skipped else ""
    _tell(f"{tally.written} drafts written to {out}{skipped}")
    if tally.failed:
        for name, message in tally.failed:
            _tell(f"failed: {printable(name)}: {message}")
        raise RadiographError(f"{len(tally.failed)} of {len(items)} radiographs failed; the others are done")
    if found.unreadable:
        raise RadiographError(f"{len(found.unreadable)} folders could not be read; change their permissions")


@app.command("serve")
def serve_command(
    host: Annotated[str, typer.Option(help="Address to listen on; off this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8642,
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    token: Annotated[
        str | None, typer.Option(envvar="CBEDGE_TOKEN", help="What clients must send; better set as CBEDGE_TOKEN.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Drafts that may wait; one more is answered 429.")] = 8,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until a draft is given up.")] = 60.0,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest request that is read, in MB.")] = 64,
    idle: Annotated[float, typer.Option(min=0.1, help="Seconds until a client that sends nothing is cut off.")] = 10.0,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients may address the service; may be repeated.",
            show_default="this machine's loopback names; any name with a token",
        ),
    ] = None,
    recent_studies: Annotated[
        int, typer.Option(min=0, max=64, help="Studies kept in memory, to be drafted again sooner.")
    ] = 4,
    template: Template = None,
) -> None:
    """Serve drafts over HTTP, with a page to try it: http://127.0.0.1:8642."""
    try:
        from cbedge.services.http import ServeSettings, check_exposure, run_server
    except ImportError as error:
        raise OutputError(f'cbedge serve needs the package {error.name}; type: pip install "cbedge[serve]"') from None
    check_exposure(host, token)
    from cbedge.api import ReportGenerator

    generator = ReportGenerator.from_pretrained(model, variant, device, recent_studies=recent_studies)
    generator = _keeping(generator, template)
    settings = ServeSettings(token, max_mb * 2**20, queue, deadline, idle, tuple(allowed_host or ()))
    run_server(generator, host, port, settings)


@app.command("listen")
def listen_command(
    known: Annotated[list[str], typer.Option("--known", help="AE title of a node that may send; may be repeated.")],
    spool: Annotated[Path, typer.Option(help="Folder of the queue; it holds radiographs until they are drafted.")],
    peer: Annotated[
        str | None, typer.Option(help="PACS for the drafts, as AET@host:port.", show_default="they stay in the spool")
    ] = None,
    aet: Annotated[str, typer.Option(help="This node's AE title.")] = "CBEDGE",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 11112,
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    retry: Annotated[float, typer.Option(min=0.1, help="Seconds after the first failed delivery.")] = 5.0,
    pair_wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a radiograph waits for its study's other view; 0 pairs none.")
    ] = 10.0,
    template: Template = None,
) -> None:
    """Be a DICOM node: draft every CR or DX image that is sent, and send the draft on as a Structured Report."""
    try:
        from cbedge.services.dicom_node import ListenSettings, Peer, run_listener
    except ImportError as error:
        raise OutputError(
            f'cbedge listen needs the package {error.name}; type: pip install "cbedge[hospital]"'
        ) from None
    from cbedge.api import ReportGenerator
    from cbedge.outputs import check_format

    check_format("sr")
    node = Peer.parse(peer) if peer else None
    settings = ListenSettings(aet, host, port, tuple(known), node, spool, retry, pair_wait_s=pair_wait)
    run_listener(_keeping(ReportGenerator.from_pretrained(model, variant, device), template), settings)


@app.command("doctor")
def doctor_command(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See whether this machine can draft reports, and what to type where it cannot."""
    from dataclasses import asdict

    from cbedge.doctor import examine
    from cbedge.errors import CbedgeError

    checks = []
    for check in examine(model):
        checks.append(check)
        if not as_json:
            typer.echo(f"{check.state:8}{check.name}: {check.found}")
            if check.remedy:
                typer.echo(f"{'':8}{'':{len(check.name)}}  to do: {check.remedy}")
    if as_json:
        import json

        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    faults = sum(check.state == "fault" for check in checks)
    if faults:
        raise CbedgeError(f"{faults} of {len(checks)} checks found a fault: see above")


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of the reports that --json writes."""
    from cbedge.outputs import SCHEMA

    typer.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)


@app.command("model")
def model_command(
    model: Model = None,
    card: Annotated[bool, typer.Option("--card", help="Print the whole model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Say which model is embedded, and verify every file of it."""
    from cbedge.backends import choose_variant
    from cbedge.bundles.bundle import CARD, MANIFEST, open_bundle

    bundle = open_bundle(model)
    if card or as_json:
        bundle.verify((CARD,))
        typer.echo((bundle.folder / (CARD if card else MANIFEST)).read_text(encoding="utf-8"), nl=False)
        return
    bundle.verify()
    manifest = bundle.manifest
    typer.echo(f"{manifest.name} {manifest.version} ({manifest.license})")
    try:
        here = choose_variant(bundle)[0]
    except DeviceError:  # no ONNX Runtime
        here = manifest.default_variant
    for name, variant in manifest.variants.items():
        size = sum(manifest.files[file].size for file in bundle.variant_files(variant))
        taken = ", taken on this machine" if name == here else ""
        typer.echo(f"  {name}: {variant.description}, {size / 1e6:.1f} MB{taken}")
    for base in manifest.base_weights:
        typer.echo(f"  from {base['origin']} ({base['licence']})")
    for data in manifest.training_data:
        typer.echo(f"  trained on {data['name']} ({data['licence']})")
    for row, scores in manifest.quality.get("scores", {}).items():
        typer.echo(f"  {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    typer.echo(f"{len(manifest.files)} files verified (SHA-256) in {bundle.folder}")
    typer.echo("The whole card: cbedge model --card")


class _Interrupted(BaseException):
    """Ctrl-C; no :class:`KeyboardInterrupt`, of which the command-line library makes a message of its own."""


def main() -> NoReturn:
    """Run the command line; an expected failure is one line on standard error and its exit code."""
    _prepare_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        sys.exit(_run())
    except BrokenPipeError:  # the reader went away, as with `| head`
        _discard_output()
        sys.exit(141)


def _run() -> int:
    try:
        try:
            app()
        except SystemExit as end:
            sys.stdout.flush()
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        return 0
    except CbedgeError as error:
        _tell(f"cbedge: {error}")
        return error.exit_code
    except BrokenPipeError:
        raise
    except MemoryError:
        _tell("cbedge: not enough memory for this radiograph and model: close programs or scale it down")
        return 1
    except _Interrupted:
        _tell("cbedge: interrupted")
        return 130
    except OSError as error:
        if error.filename is not None or sys.stdout.closed:
            raise
        _discard_output()
        _tell(f"cbedge: cannot write to standard output: {error.strerror}; give --output FILE")
        return OutputError.exit_code


def _tell(text: str) -> None:
    """Print on standard error; a message that cannot be printed changes neither the work nor the exit code."""
    with suppress(OSError):
        typer.echo(text, err=True)


def _discard_output() -> None:
    """Let Python not try again, at its end, to write what cannot be written."""
    sink = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(sink, sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> NoReturn:
    raise _Interrupted


def _prepare_streams() -> None:
    """Let no character, and no closed stream, end a command with a traceback."""
    if sys.stdout is None:  # closed, as with `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is going on; nothing where standard error is none."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def _read_text(path: Path) -> str:
    try:
        if not path.is_file() and path.exists():
            raise ContextError(f"{path} is not a regular file; pass a text file with a normal report")
        with open(path, encoding="utf-8-sig") as file:
            return file.read(1 << 20)
    except FileNotFoundError:
        raise ContextError(f"no such file: {path}; pass a text file with a normal report") from None
    except UnicodeDecodeError:
        raise ContextError(f"{path} is not valid UTF-8; pass a text file with a normal report") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ContextError(f"cannot read {str(path)[:100]} ({reason}): pass a text file with a normal report") from None


def _keeping(generator: "ReportGenerator", template: Path | None) -> "ReportGenerator":
    if template is not None:
        generator.keep_to(_read_text(template))
    return generator


def _print(content: bytes) -> None:
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise OutputError(f"cannot write to standard output: {error.strerror}; give --output FILE") from None


def _check_output(output: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    from cbedge.files import check_output

    check_output(output, force, inputs)


def _check_not_input(output: Path, inputs: Sequence[Path]) -> None:
    from cbedge.files import is_same_file

    if any(is_same_file(output, path) for path in inputs):
        raise OutputError(f"{output} is one of the inputs, which are never replaced: give another path")


def _write(output: Path, content: bytes, force: bool, inputs: Sequence[Path] = ()) -> None:
    from cbedge.files import write_output

    write_output(output, content, force, inputs)


if __name__ == "__main__":
    main()
