"""Kill ``cbedge listen`` again and again while it receives, drafts and sends.

Each round starts the node on the same spool, sends radiographs, and kills it with SIGKILL at a random time. A last run,
which is not killed, must finish the rest. Each acknowledged radiograph must have exactly one document at the PACS: a
repeated delivery must have the same identifier, so that a PACS keeps one. No radiograph may be moved to ``failed`` only
because it was being drafted when the process was killed.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydicom.uid import generate_uid

from benchmarks.common import TRACEBACK, free_port, write_record
from benchmarks.listen_node import Node, Pacs, encode, radiograph, send
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def kill_rounds(rounds: int, per_round: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill the node, let a last run finish, and count.

    Args:
        rounds: number of times the node is killed.
        per_round: radiographs sent in each round, over two associations.

    Returns:
        Numbers of ``acknowledged`` radiographs, of these ``lost``, with documents of several identifiers or also moved
        to ``failed`` (``twice``), ``delivered_again`` and ``failed``; of ``tracebacks``; whether the last run
        ``finished``.
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
        end = time.monotonic() + 600
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
        "tracebacks": log.count(TRACEBACK),
        "finished": finished,
    }


@app.command(help=__doc__)
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of times the node is killed.")] = 50,
    per_round: Annotated[int, typer.Option(min=1, help="Radiographs sent in each round.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the times of the kills.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Run, print and record; exit with 1 if a radiograph is lost, repeated or failed."""
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_rounds(rounds, per_round, seed, Path(folder))
    write_record(provenance(f"{rounds * per_round} copies of the example radiograph") | counts, output)
    clean = counts["finished"] and not any(counts[name] for name in ("lost", "twice", "failed", "tracebacks"))
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    app()
