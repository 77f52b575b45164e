"""Kill ``cbedge batch`` again and again while a second one runs on the same output.

Each round starts two batches on one output file, kills both with SIGKILL after a random time, and checks the file:
every whole line must be a draft, no study may occur twice, and no line of an earlier round may be missing. A last run,
which is not killed, must draft the rest.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks.common import TRACEBACK, start_cbedge, write_record
from benchmarks.mutations import film
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def kill_rounds(rounds: int, films: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill batches, let a last one finish, and count.

    Args:
        rounds: number of rounds, of two processes each.
        films: number of films to draft, at least one for each round.

    Returns:
        Numbers of ``lost``, ``twice`` and ``broken`` lines and of ``tracebacks``, whether the last run ``finished``,
        and the number of lines after each round.
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
        (folder / "log").write_bytes(b"")
        pair = [_start(source, out, folder / "log") for _ in range(2)]
        before = _size(out)
        end = time.monotonic() + 60
        while _size(out) <= before and time.monotonic() < end:
            if all(process.poll() is not None for process in pair):
                break  # everything is drafted
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.4)))
        for process in pair:
            process.kill()
            process.wait()
        tracebacks += (folder / "log").read_bytes().count(TRACEBACK)
        ids, bad = _ids(out)
        broken += bad
        twice += len(ids) - len(set(ids))
        lost += len(kept - set(ids))
        kept |= set(ids)
        after_rounds.append(len(ids))
    code = _start(source, out, folder / "log").wait()
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


def _start(source: Path, out: Path, log: Path) -> subprocess.Popen:
    return start_cbedge(log, "batch", source, "--out", out, "--max-new-tokens", 4, "--accept-any-image")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _ids(out: Path) -> tuple[list[str], int]:
    """The studies of the whole lines, and how many whole lines are not drafts."""
    ids, broken = [], 0
    for line in (out.read_bytes() if out.exists() else b"").splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue  # left by a killed process; the next one removes it
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
    """Run, print and record; exit with 1 if a line is lost, repeated or broken."""
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_rounds(rounds, 8 * rounds, seed, Path(folder))
    write_record(provenance(f"{8 * rounds} copies of the example radiograph") | counts, output)
    clean = counts["finished"] and not any(counts[name] for name in ("lost", "twice", "broken", "tracebacks"))
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    app()
