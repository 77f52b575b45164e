"""Send thousands of damaged and unusual inputs through every input path, and count faults.

The paths are the Python API, ``cbedge generate`` and ``cbedge batch`` in worker processes, and ``cbedge serve`` and
``cbedge listen`` in processes of their own. Faults are crashes, hangs, tracebacks, exits without an explanation, 5xx
answers, equivalents with other findings or scores, too much memory, lost objects, and patient data in logs. Input ``i``
of a seed is always the same: ``--inputs-from i --inputs 1`` repeats it alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import write_record
from benchmarks.mutations import KINDS, Input, make_input, plan
from benchmarks.robustness_outcome import COUNTS, Failure, Outcome
from benchmarks.robustness_routes import ListenRoute, ServeRoute, ServiceRoute, WorkerRoute
from cbedge.cli.options import number
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
PACKAGES = ("numpy", "pillow", "pydicom", "onnxruntime", "pynetdicom", "fastapi", "uvicorn")


@dataclass(frozen=True)
class Campaign:
    """The inputs ``first`` to ``first + inputs`` of a seed, and how they are tried.

    Attributes:
        only: one of :data:`benchmarks.mutations.KINDS`.
        first: number of the first input.
        limit_s: seconds after which an input counts as hanging.
        keep: folder for the inputs that failed, with the command that repeats each.
        progress: report every hundredth input on standard error.
    """

    inputs: int
    seed: int
    only: str | None = None
    first: int = 0
    workers: int = 2
    limit_s: float = 60
    keep: Path | None = None
    progress: bool = False

    def command(self, first: int, inputs: int) -> str:
        """The command line that tries some inputs of this seed."""
        words = f"python -m benchmarks.robustness --seed {self.seed} --inputs-from {first} --inputs {inputs}"
        return words + (f" --only {self.only}" if self.only else "")


def run_campaign(campaign: Campaign) -> Outcome:
    """Try the inputs: services one by one, the Python API and the commands in several worker processes."""
    outcome = Outcome()
    indices: dict[str, list[int]] = {}
    for index in range(campaign.first, campaign.first + campaign.inputs):
        route = plan(campaign.seed, index, campaign.only)[1]
        indices.setdefault(route if route in ("serve", "listen") else "worker", []).append(index)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(campaign.workers + 2) as pool:
        jobs = []
        for name, found in indices.items():
            shared = iter(found)  # each index goes to one of the threads
            for number in range(campaign.workers if name == "worker" else 1):
                jobs.append(pool.submit(_work, campaign, name, Path(scratch) / str(number), shared, outcome))
    for job in jobs:
        job.result()
    return outcome


def _work(campaign: Campaign, name: str, folder: Path, indices: Iterator[int], outcome: Outcome) -> None:
    """Try inputs in one process until there are no more."""
    runner: WorkerRoute | ServiceRoute
    if name == "worker":
        runner = WorkerRoute(max(1, (os.cpu_count() or 2) // campaign.workers), campaign.limit_s)
    else:
        runner = {"serve": ServeRoute, "listen": ListenRoute}[name](folder / name, campaign.limit_s)
    sizes: list[int] = []
    try:
        for index in indices:
            made = make_input(campaign.seed, index, campaign.only)
            answer = runner.answer(campaign.seed, made, campaign.only)
            if size := answer.get("rss", 0):
                sizes.append(size)
            for failure in outcome.add(made, answer):
                _keep(campaign, failure, made)
            done = outcome.tried.total()
            if campaign.progress and done % 100 == 0:
                typer.echo(f"{done} of {campaign.inputs}, {len(outcome.failures)} failures", err=True)
    finally:
        runner.close()
        if len(sizes) >= 20:  # the first tenth loads libraries
            with outcome.lock:
                outcome.growth[f"{name} {folder.name}"] = [sizes[len(sizes) // 10], sizes[-1]]


def _keep(campaign: Campaign, failure: Failure, made: Input) -> None:
    if campaign.keep is None:
        return
    campaign.keep.mkdir(parents=True, exist_ok=True)
    path = campaign.keep / f"{made.index}-{made.kind}-{made.route}"
    path.with_suffix(Path(made.name).suffix or ".bin").write_bytes(made.data)
    note = f"{campaign.command(made.index, 1)}\n{failure.note}\n{failure.fault}: {failure.what}\n"
    path.with_suffix(".txt").write_text(note, encoding="utf-8")


def to_record(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """A campaign as JSON."""
    counts = Counter(failure.fault for failure in outcome.failures)
    kinds = Counter({kind: sum(n for (k, _), n in outcome.tried.items() if k == kind) for kind, _ in outcome.tried})
    by_route = Counter({r: sum(n for (_, q), n in outcome.tried.items() if q == r) for _, r in outcome.tried})
    return {
        **provenance("mutated inputs", packages=PACKAGES),
        "seconds": round(seconds, 1),
        "python": sys.version.split()[0],
        "inputs": outcome.tried.total(),
        "drafted": outcome.drafted,
        "refused": outcome.refused,
        "kinds": dict(kinds.most_common()),
        "routes": dict(by_route.most_common()),
        "counts": {name: counts[name] for name in COUNTS},
        "equivalents": outcome.equivalents,
        "largest_difference": round(outcome.largest_difference, 4),
        "most_held_mb": round(outcome.most_held / 1e6, 1),
        "most_held_by": outcome.most_held_by,
        "growth_mb": {name: [round(size / 1e6, 1) for size in pair] for name, pair in outcome.growth.items()},
        "failures": [vars(failure) for failure in sorted(outcome.failures, key=lambda f: f.index)],
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record of a campaign as a page."""

    def table(title: str, values: dict[str, int]) -> list[str]:
        return [f"| {title} | count |", "| --- | --- |", *[f"| {k} | {n:,} |" for k, n in values.items()], ""]

    growth = ", ".join(f"{name} {a:.0f} → {b:.0f}" for name, (a, b) in record["growth_mb"].items()) or "not measured"
    lines = [
        "# Inputs of every kind, mutated",
        "",
        f"`{record['command']}`, commit {record['commit'][:12]}",
        "",
        f"{record['inputs']:,} inputs in {record['seconds'] / 60:.1f} minutes: {record['drafted']:,} answered, "
        f"{record['refused']:,} refused. {record['equivalents']:,} equivalents; their scores differ by "
        f"{record['largest_difference']:.3f} at most. The most memory that one input took: "
        f"{record['most_held_mb']:.0f} MB ({record['most_held_by']}).",
        "",
        *table("fault", record["counts"]),
        *table("kind", record["kinds"]),
        *table("route", record["routes"]),
        f"Memory of each process after a tenth of its inputs and at the end, in MB: {growth}.",
        "",
        f"Machine: {json.dumps(record['machine'])}; Python {record['python']}; "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
        "",
    ]
    for failure in record["failures"][:50]:
        last = (failure["what"].strip().splitlines() or [""])[-1][:160]
        lines.append(f"- input {failure['index']}, {failure['kind']}, {failure['fault']}: {failure['note']}: {last}")
    return "\n".join(lines).rstrip() + "\n"


@app.command(help=__doc__)
def main(
    inputs: Annotated[int, typer.Option(min=1, help="Number of inputs.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for all inputs.")] = 0,
    inputs_from: Annotated[int, typer.Option(min=0, help="Number of the first input.")] = 0,
    only: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(KINDS)}.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes for the Python API and the commands.")] = 2,
    limit: Annotated[float, number(1, 3600, "Seconds after which an input counts as hanging.")] = 60,
    keep: Annotated[Path | None, typer.Option(help="Folder for inputs that show a fault.")] = None,
    output: Annotated[Path | None, typer.Option(help="Record to write: OUTPUT.json and OUTPUT.md.")] = None,
) -> None:
    """Run a campaign and print its counts; exit with 1 if there is a fault."""
    if only is not None and only not in KINDS:
        raise typer.BadParameter(f"unknown kind {only!r}; give one of: {', '.join(KINDS)}")
    start = time.monotonic()
    outcome = run_campaign(Campaign(inputs, seed, only, inputs_from, workers, limit, keep, progress=True))
    record = to_record(outcome, time.monotonic() - start)
    write_record(record, output, to_markdown(record))
    raise typer.Exit(1 if outcome.failures else 0)


if __name__ == "__main__":
    app()
