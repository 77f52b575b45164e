"""Train the vision encoder alone, on radiographs of several hospitals.

The same command resumes a run. A run that reaches --minutes or gets SIGTERM saves its state first; one that was killed
resumes from the last saved state.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from cbedge.cli.options import number
from training.command_line import run
from training.encoder.config import read_config
from training.encoder.films import Films, decode_films, list_films, read_pack, write_pack
from training.encoder.model import load_start
from training.encoder.run import EncoderRun
from training.fetch import DEFAULT_CACHE

FILMS_CACHE = DEFAULT_CACHE.parent / "films"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main_command(
    config: Annotated[Path, typer.Argument(help="Settings in YAML, such as training/configs/encoder.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/encoder"),
    iu_xray: Annotated[Path | None, typer.Option(help="Folder of IU X-RAY.")] = None,
    nih: Annotated[Path | None, typer.Option(help="Folder of the NIH images (films.jsonl and images/).")] = None,
    start: Annotated[str | None, typer.Option(help="Initial weights; overrides the configuration.")] = None,
    films_cache: Annotated[Path, typer.Option(help="Cache folder for decoded images.")] = FILMS_CACHE,
    base_cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    pack: Annotated[Path | None, typer.Option(help="Write images and initial weights to this file, then exit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Packed data to train on, instead of folders.")] = None,
    epochs: Annotated[
        float | None, number(0, 10_000, "Length of the schedule in epochs; overrides the configuration.")
    ] = None,
    minutes: Annotated[float | None, number(0, 100_000, "Time limit in minutes.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Fit the length of the schedule to the time limit.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="Maximum number of steps, for trials.")] = None,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU), fp32 or bf16.")] = "auto",
) -> None:
    """Train, or pack."""
    deadline = math.inf if minutes is None else time.time() + 60 * minutes
    if threads:
        torch.set_num_threads(threads)
    settings = read_config(config, epochs=epochs)
    if fit and minutes is None:
        raise ValueError("--fit needs --minutes")
    if data is not None:
        films, weights = read_pack(data)
    else:
        films = _from_folders(iu_xray, nih, films_cache, settings.side)
        weights = {}
    if start is not None or not weights:
        weights = load_start(start or settings.start, base_cache, settings.layers)
    if pack is not None:
        write_pack(films, weights, pack)
        typer.echo(f"pack: {len(films.labels)} films, {pack.stat().st_size:,} bytes")
        return
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    bf16 = precision == "bf16" or (precision == "auto" and chosen.type == "cuda")
    trainer = EncoderRun(settings, films, weights, output, chosen, bf16, _say)
    trainer.train(deadline, max_steps, fit)
    stopped = f"stopped at step {trainer.step} of {trainer.total}; the same command resumes"
    _say("finished" if trainer.finished else stopped)


def _from_folders(iu_xray: Path | None, nih: Path | None, cache: Path, side: int) -> Films:
    folders = {name: folder for name, folder in (("iu_xray", iu_xray), ("nih", nih)) if folder is not None}
    if not folders:
        raise ValueError("no films: give --data, or --iu-xray and --nih")
    return decode_films(list_films(folders), cache, side, _progress)


def _progress(done: int, total: int) -> None:
    if done % 1000 == 0 or done == total:
        _say(f"decoded {done} of {total} films")


def _say(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}")


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
