"""``cbedge bench``: measure speed and memory."""

from pathlib import Path
from typing import Annotated

import typer

from cbedge.cli.options import Device, Model
from cbedge.cli.terminal import status_line
from cbedge.errors import OutputError, RadiographError
from cbedge.files import check_output, write_output


def bench(
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Radiograph, or folder of radiographs; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of radiographs.")] = 20,
    model: Model = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Variants to measure, separated by commas.", show_default="chosen for this machine"),
    ] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one per core")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Drafts of each radiograph.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Untimed drafts before the measurement.")] = 2,
    indication: Annotated[str, typer.Option(help="Indication of every study.")] = "cough",
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens in a draft.")] = None,
    no_speculative: Annotated[
        bool, typer.Option("--no-speculative", help="Turn off speculative decoding: one token per pass.")
    ] = False,
    cold: Annotated[int, typer.Option(min=0, help="Also time this many runs of the command in new processes.")] = 0,
    form: Annotated[str, typer.Option("--format", help="table, json, csv or md.")] = "table",
    compare: Annotated[Path | None, typer.Option(help="Older results (--format json) to compare with.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot the stages to this PNG; needs matplotlib.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of --output and --plot.")] = False,
) -> None:
    """Measure this machine: time of each stage, memory, tokens per second, share of the memory bandwidth."""
    from cbedge import bench
    from cbedge.images.radiograph import load_radiograph

    if form not in bench.FORMATS:
        raise OutputError(f"unknown format {form[:20]!r}; give one of: {', '.join(bench.FORMATS)}")
    for target in filter(None, (output, plot)):
        check_output(target, force)
    before = bench.read_record(compare) if compare else None
    paths = [f for path in image or [] for f in (sorted(path.iterdir()) if path.is_dir() else [path])][:limit]
    if image and not paths:
        raise RadiographError(f"no radiograph in {image[0]}: give a file, or a folder with radiographs")
    for path in paths[:1]:
        load_radiograph(path)  # imports the reader, so that the first timed draft does not
    radiographs = [load_radiograph(path) for path in paths] or [bench.drawn_chest()]
    with status_line() as show_status:
        record = bench.bench(
            radiographs,
            model=model,
            variants=[v for v in (variants or "").split(",") if v],
            device=device,
            threads=threads,
            indication=indication,
            tokens=tokens,
            warm_up=warm_up,
            repeat=repeat,
            speculative=not no_speculative,
            progress=show_status,
        )
        if cold:
            show_status("cold start")
            measured = record["variants"][0]["variant"]
            record["cold"] = bench.cold_start(paths[0] if paths else None, model, measured, cold)
    if plot:
        bench.plot(record, plot)
    text = bench.render(record, form, before)
    if output is not None:
        write_output(output, text.encode() + b"\n", force)
    else:
        typer.echo(text)
