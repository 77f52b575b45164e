"""Send requests from many clients at once to ``cbedge serve``.

Clients ask as fast as they are answered. A client that gets 429 waits for as long as the answer says, and asks again
with its ticket. The record has drafts per second, waiting times, refusals, whether every client got the draft of its
own radiograph, and the memory of the server.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer

from benchmarks.common import serving, write_record
from cbedge import ReportGenerator
from cbedge.provenance import provenance
from training.datasets.iu_xray import read_studies

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass
class Outcome:
    """What the clients got."""

    seconds: list[float] = field(default_factory=list)
    refusals: int = 0
    wrong: int = 0
    failed: int = 0


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY.")],
    output: Annotated[Path, typer.Option(help="JSON to write.")],
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 2000,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 16,
    radiographs: Annotated[int, typer.Option(min=1, help="Number of different radiographs.")] = 20,
    model: Annotated[Path | None, typer.Option(help="Folder of a bundle.", show_default="embedded")] = None,
) -> None:
    """Measure, print and record."""
    images = [s.image.read_bytes() for s in read_studies(data, ("val",))[:radiographs]]
    generator = ReportGenerator.from_pretrained(model, device="cpu")
    wanted = [generator.generate(image, accept_any_image=True).text for image in images]
    del generator
    # Radiographs are repeated here, unlike in a hospital, so none may come from the cache of recent studies.
    options = ["--deadline", 600, "--recent-studies", 0, *(["--model", model] if model else [])]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *options) as (address, pid):
        measured = asyncio.run(_measure(address, pid, images, wanted, requests, clients))
    write_record(provenance(f"{len(images)} validation studies of IU X-RAY", model) | measured, output)


async def _measure(
    address: str, pid: int, images: list[bytes], wanted: list[str], requests: int, clients: int
) -> dict[str, Any]:
    outcome, numbers = Outcome(), iter(range(requests))
    async with httpx.AsyncClient(base_url=address, timeout=None) as client:
        await _ask(client, images[0], wanted[0], Outcome())
        server = psutil.Process(pid)
        before, start = server.memory_info().rss, time.monotonic()

        async def work() -> None:
            for number in numbers:
                await _ask(client, images[number % len(images)], wanted[number % len(images)], outcome)

        await asyncio.gather(*(work() for _ in range(clients)))
        spent = time.monotonic() - start
    p50, p95, p99 = np.percentile(outcome.seconds, (50, 95, 99)) if outcome.seconds else (0.0, 0.0, 0.0)
    return {
        "requests": requests,
        "clients": clients,
        "drafts": len(outcome.seconds),
        "failed": outcome.failed,
        "wrong_draft": outcome.wrong,
        "refusals_429": outcome.refusals,
        "drafts_per_second": len(outcome.seconds) / spent,
        "seconds": {"p50": p50, "p95": p95, "p99": p99},
        "memory_mb": {"before": before / 1e6, "after": server.memory_info().rss / 1e6},
    }


async def _ask(client: httpx.AsyncClient, image: bytes, wanted: str, outcome: Outcome) -> None:
    """Ask until there is a draft; the time counts from the first request."""
    start = time.monotonic()
    ticket: dict[str, str] = {}
    form = {"accept_any_image": "true"}
    while True:
        answer = await client.post("/v1/reports", files={"image": ("x", image)}, data=form, headers=ticket)
        if answer.status_code != 429:
            break
        outcome.refusals += 1
        ticket = {k: v for k, v in answer.headers.items() if k == "queue-ticket"}
        await asyncio.sleep(float(answer.headers["Retry-After"]))
    if answer.status_code != 200:
        outcome.failed += 1
        return
    outcome.seconds.append(time.monotonic() - start)
    outcome.wrong += answer.json()["text"] != wanted


if __name__ == "__main__":
    app()
