"""``cbedge bench``: measure speed and memory."""

from pathlib import Path
from typing import Annotated

import typer

from cbedge.cli.options import Device, Model, written_file
from cbedge.cli.terminal import status_line
from cbedge.errors import OptionError, RadiographError
from cbedge.files import check_distinct, check_output, write_output


def bench(
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="Radiograph, or folder of radiographs; repeatable.",
            show_default="a drawn image, for timing only",
        ),
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
    cold: Annotated[int, typer.Option(min=0, help="Also time this many cold starts, each in a new process.")] = 0,
    form: Annotated[str, typer.Option("--format", help="table, json, csv or md.")] = "table",
    compare: Annotated[Path | None, typer.Option(help="Older results (--format json) to compare with.")] = None,
    plot: Annotated[Path | None, written_file("Also plot the stages to this PNG; needs matplotlib.")] = None,
    output: Annotated[
        Path | None, written_file("Write to this file instead of standard output.", "--output", "-o")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of --output and --plot.")] = False,
) -> None:
    """Measure this machine: time of each stage, memory, tokens per second, share of the memory bandwidth."""
    from cbedge import bench, bench_report
    from cbedge.provenance import provenance

    if form not in bench_report.FORMATS:
        raise OptionError(f"unknown format {form[:20]!r}; give one of: {', '.join(bench_report.FORMATS)}")
    for target in filter(None, (output, plot)):
        check_output(target, force)
    check_distinct({"--output": output, "--plot": plot})
    before = bench_report.read_record(compare) if compare else None
    paths = _paths(image or [], limit)
    names = [name for name in (variants or "").split(",") if name]
    settings = bench.BenchSettings(
        model, names, device, threads, indication, tokens, warm_up, repeat, not no_speculative
    )
    with status_line() as show_status:
        measured = bench.bench(bench.load_all(paths), settings, show_status)
        record = provenance(f"radiographs: {len(paths)}" if paths else "a drawn image", model) | measured
        if cold:
            show_status("cold start")
            variant = record["variants"][0]["variant"]
            record["cold"] = bench.cold_start(paths[0] if paths else None, model, variant, cold)
    if plot:
        bench_report.plot(record, plot)
    text = bench_report.render(record, form, before)
    if output is not None:
        write_output(output, text.encode() + b"\n", force)
    else:
        typer.echo(text)


def _paths(given: list[Path], limit: int) -> list[Path]:
    paths = [path for one in given for path in (sorted(one.iterdir()) if one.is_dir() else [one])][:limit]
    if given and not paths:
        raise RadiographError(f"no radiograph in {given[0]}: give a file, or a folder with radiographs")
    return paths
