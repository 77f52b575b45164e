"""``python -m training.encoder CONFIG.yaml``: train the vision encoder alone, on films of several hospitals.

The same command resumes a run. A run stops at a time of day, after some minutes, or on SIGTERM, and saves its state
first; a run that was killed resumes from the last saved state.
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from cbedge.errors import CbedgeError
from training.encoder.config import read_config
from training.encoder.films import Films, decode_films, list_films, read_pack, write_pack
from training.encoder.model import load_start
from training.encoder.run import EncoderRun
from training.fetch import DEFAULT_CACHE

FILMS_CACHE = DEFAULT_CACHE.parent / "films"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main_command(
    config: Annotated[Path, typer.Argument(help="Settings in YAML, such as training/configs/encoder.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/encoder"),
    iu_xray: Annotated[Path | None, typer.Option(help="Folder of IU X-RAY.")] = None,
    nih: Annotated[Path | None, typer.Option(help="Folder of the NIH images (films.jsonl and images/).")] = None,
    hannover: Annotated[
        Path | None, typer.Option(help="Folder of the Hannover images; only for packing so far.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Initial weights; overrides the configuration.")] = None,
    films_cache: Annotated[Path, typer.Option(help="Cache folder for decoded images.")] = FILMS_CACHE,
    base_cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    pack: Annotated[Path | None, typer.Option(help="Write images and initial weights to this file, then exit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Packed data to train on, instead of folders.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Length of the schedule in epochs; overrides the configuration.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit in minutes.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop at this local time, HH:MM.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Fit the length of the schedule to the time limit.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="Maximum number of steps, for trials.")] = None,
    pause_file: Annotated[Path | None, typer.Option(help="Pause training while this file exists.")] = None,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU), fp32 or bf16.")] = "auto",
) -> None:
    """Train, or pack."""
    begin = time.time()
    if threads:
        torch.set_num_threads(threads)
    settings = read_config(config, epochs=epochs)
    deadline = stop_time(begin, minutes, until)
    if fit and deadline == math.inf:
        raise ValueError("--fit needs --minutes or --until")
    if data is not None:
        films, weights = read_pack(data)
    else:
        films = _from_folders(iu_xray, nih, hannover, films_cache, settings.side)
        weights = {}
    if start is not None or not weights:
        weights = load_start(start or settings.start, base_cache, settings.layers)
    if pack is not None:
        pieces = write_pack(films, weights, pack)
        typer.echo(f"pack: {len(films.labels)} films, {sum(p.stat().st_size for p in pieces):,} bytes in {len(pieces)}")
        return
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    bf16 = precision == "bf16" or (precision == "auto" and chosen.type == "cuda")
    run = EncoderRun(settings, films, weights, output, chosen, bf16, _say)
    run.train(deadline, pause_file, max_steps, fit)
    _say("finished" if run.finished else f"stopped at step {run.step} of {run.total}; the same command resumes")


def _from_folders(iu_xray: Path | None, nih: Path | None, hannover: Path | None, cache: Path, side: int) -> Films:
    given = {"iu_xray": iu_xray, "nih": nih, "hannover": hannover}
    folders = {name: folder for name, folder in given.items() if folder is not None}
    if not folders:
        raise ValueError("no films: give --data, or --iu-xray and --nih")
    return decode_films(list_films(folders), cache, side, _progress)


def _progress(done: int, total: int) -> None:
    if done % 1000 == 0 or done == total:
        _say(f"decoded {done} of {total} films")


def stop_time(now: float, minutes: float | None, until: str | None) -> float:
    """The time to stop, as :func:`time.time` counts; infinite without a limit.

    Raises:
        ValueError: ``until`` is not HH:MM.
    """
    ends = [math.inf]
    if minutes is not None:
        ends.append(now + 60 * minutes)
    if until is not None:
        try:
            clock = datetime.time.fromisoformat(until)
        except ValueError:
            raise ValueError(f"--until is {until!r}; give HH:MM") from None
        today = datetime.datetime.fromtimestamp(now)
        end = datetime.datetime.combine(today.date(), clock)
        if end <= today:
            end += datetime.timedelta(days=1)
        ends.append(end.timestamp())
    return min(ends)


def _say(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}")


def main() -> None:
    """Run the command line; an expected failure is one line and exit code 1."""
    try:
        app()
    except (CbedgeError, ValueError, RuntimeError, OSError, yaml.YAMLError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
