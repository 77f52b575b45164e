"""Send many C-STORE requests, one in five of them garbage, from several peers to ``cbedge listen``.

Every acknowledged object must end at the PACS or in the spool's folder ``failed``, and not in both; only objects that
cannot be stored may be refused. The memory of the node is measured during the run: it must not grow.
"""

from __future__ import annotations

import copy
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from benchmarks.common import TRACEBACK, free_port, write_record
from benchmarks.listen_node import Node, Pacs, encode, radiograph, send
from cbedge.cli.options import number
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
GARBAGE = ("noise", "cut short", "no pixels", "another modality", "malformed study")
_BATCH = 10  # objects in an association
_WAITING = 200  # largest number of objects in the spool, so that memory is measured while drafts are made


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


@dataclass
class Soak:
    """One soak: what is sent where, and what became of it.

    Attributes:
        objects: total number of C-STORE requests.
        peers: number of concurrent senders.
        seed: random seed for the objects.
        node, pacs: where objects are sent, and where the node sends its documents.
        answers: number of answers by status.
        kinds: SOP Instance UID of each acknowledged object → ``good``, or one of :data:`GARBAGE`.
        memory: resident memory of the node in MB, by share of the objects that were processed.
    """

    objects: int
    peers: int
    seed: int
    node: Node
    pacs: Pacs
    answers: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, str] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send_all(self, number: int) -> None:
        """Send the share of one peer."""
        rng = random.Random(self.seed * 1_000_003 + number)
        films = [radiograph(index) for index in range(4)]
        for first in range(number * _BATCH, self.objects, self.peers * _BATCH):
            while self.node.unfinished() > _WAITING and self.node.process.poll() is None:
                time.sleep(0.2)
            made = [self._make(index, rng, films) for index in range(first, min(first + _BATCH, self.objects))]
            if rng.random() < 0.2:
                with suppress(OSError), socket.create_connection(("127.0.0.1", self.node.port), 5) as stray:
                    stray.sendall(rng.randbytes(rng.randrange(200)))
            statuses = send(self.node.port, [(uid, content) for uid, content, _ in made])
            with self.lock:
                for (uid, _, kind), status in zip(made, statuses, strict=True):
                    self.answers["none" if status is None else f"{status:#06x}"] += 1
                    if status == 0:
                        self.kinds[uid] = kind

    def _make(self, index: int, rng: random.Random, films: list[Dataset]) -> tuple[str, bytes, str]:
        """An object's SOP Instance UID, bytes and kind."""
        dataset = copy.deepcopy(rng.choice(films))
        dataset.SOPInstanceUID = identifier = generate_uid(entropy_srcs=[str(self.seed), str(index)])
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
        content, kind = encode(dataset), "good"
        if index % 5 == 4:
            kind = rng.choice(GARBAGE)
            content = spoil(kind, rng, content, dataset)
        return str(identifier), content, kind

    def measure_memory(self, done: threading.Event) -> None:
        """Measure the node's memory after 1, 10, 50 and 100% of the objects."""
        resident = psutil.Process(self.node.process.pid)
        while not done.wait(0.2):
            processed = len(self.pacs.images) + len(self.node.failed())
            all_sent = sum(self.answers.values()) == self.objects
            for share in (1, 10, 50, 100):
                least = len(self.kinds) if share == 100 else self.objects * share // 100
                if processed >= max(1, least) and (share < 100 or all_sent):
                    self.memory.setdefault(f"{share}%", round(resident.memory_info().rss / 1e6, 1))

    def counts(self, failed: set[str]) -> dict[str, Any]:
        """What became of the objects; ``failed`` are the SOP Instance UIDs in the spool's folder of that name."""
        at_pacs, good = set(self.pacs.images), {uid for uid, kind in self.kinds.items() if kind == "good"}
        return {
            "objects": self.objects,
            "peers": self.peers,
            "seed": self.seed,
            "answers": dict(self.answers),
            "good": len(good),
            "garbage": dict(Counter(kind for kind in self.kinds.values() if kind != "good")),
            "at_pacs": len(at_pacs),
            "failed": len(failed),
            "lost": len(set(self.kinds) - at_pacs - failed),
            "twice": len(at_pacs & failed) + sum(len(found) > 1 for found in self.pacs.documents.values()),
            "good_not_drafted": len(good - at_pacs),
            "garbage_drafted": dict(
                Counter(kind for uid in at_pacs if (kind := self.kinds.get(uid, "good")) != "good")
            ),
            "memory_mb": self.memory,
        }


def soak(objects: int, peers: int, seed: int, folder: Path, limit_s: float) -> dict[str, Any]:
    """Send the objects, with silent connections and noise on the port beside them, and count.

    Args:
        objects, peers, seed: as in :class:`Soak`.
        folder: an empty folder to work in.
        limit_s: seconds for the whole run.
    """
    start, port = time.monotonic(), free_port()
    pacs = Pacs(port)
    node = Node(folder, port)
    run, done = Soak(objects, peers, seed, node, pacs), threading.Event()
    watching = threading.Thread(target=run.measure_memory, args=(done,), daemon=True)
    with ExitStack() as stack:
        stack.callback(pacs.close)
        stack.callback(node.close)
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", node.port)))
        watching.start()
        stack.callback(watching.join)
        stack.callback(done.set)
        with ThreadPoolExecutor(peers) as pool:
            list(pool.map(run.send_all, range(peers)))
        while node.unfinished() and node.process.poll() is None and time.monotonic() - start < limit_s:
            time.sleep(0.2)
        time.sleep(1)
        alive, failed, left = node.process.poll() is None, node.failed(), node.unfinished()
    return run.counts(failed) | {
        "left_in_spool": left,
        "alive": alive,
        "tracebacks": node.log.read_bytes().count(TRACEBACK),
        "seconds": round(time.monotonic() - start, 1),
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = ["# A soak of `cbedge listen`", "", f"`{record['command']}` at commit {record['commit']}", ""]
    provenance_names = ("command", "commit", "bundle", "data", "versions", "machine")
    lines += ["| | |", "|---|---|"]
    for name, value in record.items():
        if name not in provenance_names:
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


@app.command(help=__doc__)
def main(
    objects: Annotated[int, typer.Option(min=100, help="Total number of C-STORE requests.")] = 5_000,
    peers: Annotated[int, typer.Option(min=1, help="Concurrent senders.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the objects.")] = 0,
    limit: Annotated[float, number(1, 1e6, "Time limit in seconds.")] = 7200,
    output: Annotated[Path | None, typer.Option(help="JSON file for the record; a table is written beside it.")] = None,
) -> None:
    """Run the soak and print or write the record; exit with 1 if an object is not accounted for."""
    with tempfile.TemporaryDirectory() as folder:
        record = provenance("drawn DICOM objects") | soak(objects, peers, seed, Path(folder), limit)
    write_record(record, output, to_markdown(record))
    wrong = ("lost", "twice", "good_not_drafted", "left_in_spool", "tracebacks")
    raise typer.Exit(0 if record["alive"] and not any(record[name] for name in wrong) else 1)


if __name__ == "__main__":
    app()
