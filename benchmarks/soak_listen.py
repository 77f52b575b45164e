"""``python -m benchmarks.soak_listen``: many C-STOREs into ``cbedge listen`` from several peers, garbage among them.

Every object that was acknowledged must end at the PACS or in the spool's folder ``failed``, none in both; what is
refused must be what cannot be kept. The node's memory is read along the way: it must not grow.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from pydicom.uid import generate_uid

from benchmarks.listen_node import Node, Pacs, encode, free_port, radiograph, send
from cbedge.bench import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GARBAGE = ("noise", "cut short", "no pixels", "another modality", "malformed study")
_BATCH = 10  # objects an association
_WAITING = 200  # in the spool at most, so that memory is read while drafts are made


def spoil(kind: str, rng: random.Random, whole: bytes, dataset: Any) -> bytes:
    """An object that gives no draft, as the bytes of its data set."""
    if kind == "noise":
        return rng.randbytes(rng.randrange(1, 5000))
    if kind == "cut short":
        return whole[: rng.randrange(1, len(whole) - 1)]
    if kind == "no pixels":
        del dataset.PixelData
    elif kind == "another modality":
        dataset.Modality = "CT"
    else:
        dataset.StudyInstanceUID = "abc"
    return encode(dataset)


def soak(objects: int, peers: int, seed: int, folder: Path, limit_s: float) -> dict[str, Any]:
    """Send so many objects, one in five garbage, and idle connections and noise on the port beside them.

    Args:
        objects: Total number of C-STORE requests.
        peers: that send at the same time.
        seed: of what is sent.
        folder: an empty one to work in.
        limit_s: seconds for all of it.

    Returns:
        Answers by status; ``good`` and ``garbage`` acknowledged; how many of them are at the PACS, put aside, ``lost``
        or in both (``twice``); garbage that was drafted; good ones that were put aside; memory in MB by share of the
        objects dealt with; ``tracebacks`` in the log; seconds.
    """
    start, port = time.monotonic(), free_port()
    pacs, answers, lock = Pacs(port), Counter[str](), threading.Lock()
    kinds: dict[str, str] = {}
    memory: dict[str, float] = {}
    node = Node(folder, port)
    resident = psutil.Process(node.process.pid)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            dealt = len(pacs.images) + len(node.failed())
            for share in (1, 10, 50, 100):
                if dealt >= max(1, len(kinds) if share == 100 else objects * share // 100) and (
                    share < 100 or sum(answers.values()) == objects
                ):
                    memory.setdefault(f"{share}%", round(resident.memory_info().rss / 1e6, 1))

    def peer(number: int) -> None:
        rng = random.Random(seed * 1_000_003 + number)
        films = [radiograph(index) for index in range(4)]
        for first in range(number * _BATCH, objects, peers * _BATCH):
            while node.unfinished() > _WAITING and node.process.poll() is None:
                time.sleep(0.2)
            made = []
            for index in range(first, min(first + _BATCH, objects)):
                dataset = copy.deepcopy(rng.choice(films))
                identifier = generate_uid(entropy_srcs=[str(seed), str(index)])
                dataset.SOPInstanceUID = identifier
                dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
                content, kind = encode(dataset), "good"
                if index % 5 == 4:
                    kind = rng.choice(GARBAGE)
                    content = spoil(kind, rng, content, dataset)
                made.append((str(identifier), content, kind))
            if rng.random() < 0.2:
                with suppress(OSError), socket.create_connection(("127.0.0.1", node.port), 5) as stray:
                    stray.sendall(rng.randbytes(rng.randrange(200)))
            statuses = send(node.port, [(uid, content) for uid, content, _ in made])
            with lock:
                for (uid, _, kind), status in zip(made, statuses, strict=True):
                    answers["none" if status is None else f"{status:#06x}"] += 1
                    if status == 0:
                        kinds[uid] = kind

    silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(8)]
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        with ThreadPoolExecutor(peers) as pool:
            list(pool.map(peer, range(peers)))
        while node.unfinished() and node.process.poll() is None and time.monotonic() - start < limit_s:
            time.sleep(0.2)
        time.sleep(1)
        alive = node.process.poll() is None
        failed = node.failed()
        left = node.unfinished()
    finally:
        done.set()
        watching.join()
        for connection in silent:
            connection.close()
        node.close()
        pacs.close()
    at_pacs, good = set(pacs.images), {uid for uid, kind in kinds.items() if kind == "good"}
    return {
        "objects": objects,
        "peers": peers,
        "seed": seed,
        "answers": dict(answers),
        "good": len(good),
        "garbage": dict(Counter(kind for kind in kinds.values() if kind != "good")),
        "at_pacs": len(at_pacs),
        "failed": len(failed),
        "left_in_spool": left,
        "lost": len(set(kinds) - at_pacs - failed),
        "twice": len(at_pacs & failed) + sum(len(found) > 1 for found in pacs.documents.values()),
        "good_not_drafted": len(good - at_pacs),
        "garbage_drafted": dict(Counter(kinds[uid] for uid in at_pacs if kinds.get(uid, "good") != "good")),
        "alive": alive,
        "tracebacks": node.log.read_bytes().count(b"Traceback (most recent call last)"),
        "memory_mb": memory,
        "seconds": round(time.monotonic() - start, 1),
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [(name, value) for name, value in record.items() if name not in ("command", "machine", "commit")]
    lines = ["# A soak of `cbedge listen`", "", f"`{record['command']}` at commit {record['commit'][:7]}", ""]
    lines += ["| | |", "|---|---|"]
    for name, value in rows:
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


@app.command(help=__doc__)
def main(
    objects: Annotated[int, typer.Option(min=100, help="Total number of C-STORE requests.")] = 5_000,
    peers: Annotated[int, typer.Option(min=1, help="Concurrent senders.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the objects.")] = 0,
    limit: Annotated[float, typer.Option(min=1, help="Time limit in seconds.")] = 7200,
    output: Annotated[Path | None, typer.Option(help="JSON file for the record; a table is written beside it.")] = None,
) -> None:
    """Soak the node and print or write the record; end with 1 where an object is not accounted for."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = f"python -m benchmarks.soak_listen --objects {objects} --peers {peers} --seed {seed}"
    folder = Path(tempfile.mkdtemp())
    try:
        record = {"command": command, "commit": commit, "machine": machine()}
        record |= soak(objects, peers, seed, folder, limit)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(record, indent=1)
    if output is not None:
        output.write_text(f"{text}\n", encoding="utf-8")
        output.with_suffix(".md").write_text(table(record), encoding="utf-8")
    typer.echo(text)
    wrong = ("lost", "twice", "good_not_drafted", "left_in_spool", "tracebacks")
    raise typer.Exit(0 if record["alive"] and not any(record[name] for name in wrong) else 1)


if __name__ == "__main__":
    app()
