"""``python -m benchmarks.kill_listen``: ``cbedge listen`` killed again and again while it receives, drafts and sends.

Each round starts the node on the same spool, sends radiographs and kills it with SIGKILL at a random moment. A last
run, which nobody kills, has to finish the rest. What was acknowledged must be at the PACS, once: a document that is
delivered again must have the same identifier, so that a PACS keeps one, and no radiograph may be put aside because it
happened to be in turn when the process was killed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydicom.uid import generate_uid

from benchmarks.listen_node import Node, Pacs, encode, free_port, radiograph, send
from cbedge.bench import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def kill_rounds(rounds: int, per_round: int, seed: int, folder: Path, limit_s: float = 600) -> dict[str, Any]:
    """Kill the node for some rounds, let it finish, and count.

    Args:
        rounds: times that it is killed.
        per_round: radiographs sent in each, over two associations.
        seed: of the moments at which it is killed.
        folder: an empty one to work in.
        limit_s: seconds for the last run.

    Returns:
        ``acknowledged`` radiographs; those of them that are ``lost``; documents that are there ``twice``, with another
        identifier; documents ``delivered_again``; radiographs put aside; ``tracebacks``; whether all ``finished``.
    """
    rng = np.random.default_rng(seed)
    films = [radiograph(number) for number in range(4)]
    port = free_port()
    pacs = Pacs(port)
    acknowledged: set[str] = set()
    try:
        for _ in range(rounds):
            node = Node(folder, port)
            objects = []
            for number in range(per_round):
                dataset = films[number % len(films)]
                dataset.SOPInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
                dataset.SeriesInstanceUID = generate_uid()
                objects.append((str(dataset.SOPInstanceUID), encode(dataset)))
            with ThreadPoolExecutor(2) as pool:
                halves = [objects[::2], objects[1::2]]
                sending = [pool.submit(send, node.port, half) for half in halves]
                time.sleep(float(rng.uniform(0.05, 2)))
                node.kill()
                for half, answer in zip(halves, sending, strict=True):
                    statuses = answer.result()
                    acknowledged |= {uid for (uid, _), status in zip(half, statuses, strict=True) if status == 0}
        node = Node(folder, port)
        end = time.monotonic() + limit_s
        while node.unfinished() and time.monotonic() < end:
            time.sleep(0.1)
        finished, failed = not node.unfinished(), node.failed()
        node.close()
    finally:
        pacs.close()
    log = node.log.read_bytes()
    return {
        "rounds": rounds,
        "seed": seed,
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - set(pacs.images) - failed),
        "twice": sum(len(found) > 1 for found in pacs.documents.values()) + len(failed & set(pacs.images)),
        "delivered_again": sum(pacs.images.values()) - len(pacs.images),
        "failed": len(failed),
        "tracebacks": log.count(b"Traceback (most recent call last)"),
        "finished": finished,
    }


@app.command(help=__doc__)
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of times the node is killed.")] = 50,
    per_round: Annotated[int, typer.Option(min=1, help="Radiographs sent in each round.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the times of the kills.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Run, print and record; end with 1 where anything is lost, twice or put aside."""
    folder = Path(tempfile.mkdtemp())
    try:
        record = kill_rounds(rounds, per_round, seed, folder)
    finally:
        shutil.rmtree(folder)
    command = f"python -m benchmarks.kill_listen --rounds {rounds} --per-round {per_round} --seed {seed}"
    record |= {"command": command, "machine": machine()}
    text = json.dumps(record, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)
    clean = record["finished"] and not any(record[name] for name in ("lost", "twice", "failed", "tracebacks"))
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    app()
