"""``python -m benchmarks.kill_batch``: ``cbedge batch`` killed again and again, with a second one beside it.

Each round starts two batches on one output, kills both with SIGKILL after a random time, and looks at the file: every
whole line is a draft, no study is there twice, and no line of an earlier round is gone. A last run, which nobody kills,
has to finish the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks.mutations import film
from cbedge.bench import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_ROOT = Path(__file__).parent.parent


def kill_rounds(rounds: int, films: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill batches for some rounds, finish, and count.

    Args:
        rounds: of two processes each.
        films: in the folder that is drafted, at least one a round.
        seed: of the moments at which they are killed.
        folder: an empty one to work in.

    Returns:
        ``lost``, ``twice`` and ``broken`` lines, ``tracebacks``, whether the last run ``finished``, and how many lines
        the rounds left behind.
    """
    rng = np.random.default_rng(seed)
    source, out = folder / "films", folder / "drafts.jsonl"
    source.mkdir(parents=True)
    for number in range(films):
        values = np.round(film(number % 4) * (255 - number % 50)).astype(np.uint8)
        Image.fromarray(values).save(source / f"{number:04}.png")
    kept: set[str] = set()
    lost = twice = broken = tracebacks = 0
    after_rounds = []
    for _ in range(rounds):
        with open(folder / "log", "wb") as log:
            pair = [_start(source, out, log) for _ in range(2)]
            before = out.stat().st_size if out.exists() else 0
            end = time.monotonic() + 60
            while (out.stat().st_size if out.exists() else 0) <= before and time.monotonic() < end:
                if all(process.poll() is not None for process in pair):
                    break  # all is drafted
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0, 0.4)))
            for process in pair:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()
        tracebacks += (folder / "log").read_bytes().count(b"Traceback (most recent call last)")
        ids, bad = _ids(out)
        broken += bad
        twice += len(ids) - len(set(ids))
        lost += len(kept - set(ids))
        kept |= set(ids)
        after_rounds.append(len(ids))
    with open(folder / "log", "wb") as log:
        code = _start(source, out, log).wait()
    ids, bad = _ids(out)
    content = out.read_bytes()
    return {
        "rounds": rounds,
        "films": films,
        "seed": seed,
        "lost": lost + len(kept - set(ids)),
        "twice": twice + len(ids) - len(set(ids)),
        "broken": broken + bad,
        "tracebacks": tracebacks,
        "finished": code == 0 and len(set(ids)) == films and content.endswith(b"\n"),
        "lines_after_rounds": after_rounds,
    }


def _start(source: Path, out: Path, log: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "cbedge.cli", "batch", str(source), "--out", str(out), "--max-new-tokens", "4"]
    command += ["--device", "cpu", "--accept-any-image"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def _ids(out: Path) -> tuple[list[str], int]:
    """The studies of the whole lines, and how many whole lines are not drafts."""
    ids, broken = [], 0
    for line in (out.read_bytes() if out.exists() else b"").splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue  # what a killed process left, which the next one cuts off
        try:
            values = json.loads(line)
            ids.append(str(values["id"]))
            broken += values["status"] != "ok"
        except (ValueError, KeyError):
            broken += 1
    return ids, broken


@app.command(help=__doc__)
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of times two batches are killed.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the times of the kills.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Run, print and record; end with 1 where anything is lost or twice."""
    folder = Path(tempfile.mkdtemp())
    try:
        record = kill_rounds(rounds, 8 * rounds, seed, folder)
    finally:
        shutil.rmtree(folder)
    record |= {"command": f"python -m benchmarks.kill_batch --rounds {rounds} --seed {seed}", "machine": machine()}
    text = json.dumps(record, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)
    clean = record["finished"] and not any(record[name] for name in ("lost", "twice", "broken", "tracebacks"))
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    app()
