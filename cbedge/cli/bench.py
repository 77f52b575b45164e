"""``cbedge bench``: measure speed and memory."""

from pathlib import Path
from typing import Annotated

import typer

from cbedge.cli.options import Model
from cbedge.cli.terminal import status_line
from cbedge.errors import OutputError, RadiographError
from cbedge.files import check_output, write_output


def bench(
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
        check_output(target, force)
    before = bench.read_record(compare) if compare else None
    paths = [f for path in image or [] for f in (sorted(path.iterdir()) if path.is_dir() else [path])][:limit]
    if image and not paths:
        raise RadiographError(f"no radiograph in {image[0]}: give a file, or a folder that holds some")
    for path in paths[:1]:
        load_radiograph(path)  # or the first one's time would hold that of importing what reads it
    radiographs = [load_radiograph(path) for path in paths] or [bench.drawn_chest()]
    with status_line() as tell:
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
        write_output(output, text.encode() + b"\n", force)
    else:
        typer.echo(text)
