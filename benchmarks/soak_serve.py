"""Ask ``cbedge serve`` for many drafts from several clients, with one request of garbage for every nine.

Every answer is counted (drafts, refusals, and 429 or 503 that were asked again). The memory of the server is measured
during the run: it must not grow.
"""

from __future__ import annotations

import io
import random
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated

import httpx
import numpy as np
import psutil
import typer
from PIL import Image

from benchmarks.common import EXAMPLE, serving, write_record
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def films(sizes: tuple[int, ...] = (224, 400, 700, 978)) -> list[bytes]:
    """The example radiograph in several sizes and encodings, as bytes of a file."""
    found = []
    with Image.open(EXAMPLE) as example:
        for size in sizes:
            for kind in ("PNG", "JPEG"):
                buffer = io.BytesIO()
                example.resize((size, size)).save(buffer, kind)
                found.append(buffer.getvalue())
    return found


def garbage(rng: random.Random, whole: bytes) -> tuple[bytes, dict[str, str]]:
    """A request that cannot be drafted: a damaged file, noise, or a wrong field."""
    kind = rng.randrange(4)
    if kind == 0:
        return whole[: rng.randrange(1, 2000)], {}
    if kind == 1:
        noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (96, 96)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue(), {}
    return (whole, {"indicaton": "cough"}) if kind == 2 else (rng.randbytes(500), {})


def soak(drafts: int, clients: int = 4, seed: int = 0) -> dict[str, object]:
    """Send the requests, and count.

    Returns:
        Answers by status, number of drafts that differ from the first of the same film, memory in MB by share of the
        requests answered, and seconds.
    """
    good = films()
    texts: dict[int, str] = {}
    answers: Counter[str] = Counter()
    memory: dict[str, float] = {}
    differing, lock, start = 0, threading.Lock(), monotonic()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (address, process):
        resident = psutil.Process(process)

        def ask(number: int) -> None:
            nonlocal differing
            rng = random.Random((seed, number).__hash__())
            which = rng.randrange(len(good))
            content, fields = (good[which], {"indication": "cough"}) if number % 10 else garbage(rng, good[which])
            while True:
                answer = httpx.post(f"{address}/v1/reports", files={"image": content}, data=fields, timeout=120)
                if answer.status_code not in (429, 503):
                    break
                with lock:
                    answers["asked again"] += 1
                sleep(min(float(answer.headers.get("Retry-After", 1)), 2) * rng.random())
            with lock:
                answers[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    text = answer.json()["text"]
                    differing += texts.setdefault(which, text) != text
                done = sum(answers.values()) - answers["asked again"]
                for share in (1, 10, 50, 100):
                    if done == max(1, drafts * share // 100):
                        memory[f"{share}%"] = round(resident.memory_info().rss / 1e6, 1)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(ask, range(drafts)))
    return {
        "drafts": drafts,
        "clients": clients,
        "answers": dict(answers),
        "differing": differing,
        "memory_mb": memory,
        "seconds": round(monotonic() - start, 1),
    }


@app.command(help=__doc__)
def main(
    drafts: Annotated[int, typer.Option(min=100, help="Total number of requests.")] = 20_000,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
) -> None:
    """Run the soak and print or write the record."""
    write_record(provenance("the example radiograph and inputs that are none") | soak(drafts, clients), output)


if __name__ == "__main__":
    app()
