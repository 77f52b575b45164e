"""Estimate the limits of bandwidth and arithmetic, larger models, other machines, and the queue in front of a machine.

``--latency`` is the output of ``cbedge bench --format json`` on this machine. Other machines are estimated: a pass over
the weights takes at least their bytes divided by the memory bandwidth, and at least their multiplications divided by
the arithmetic rate (the roofline model of Williams et al., CACM 2009). The queue is simulated: Poisson arrivals, first
come first served, service times drawn from the measured quantiles.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import refuse_existing, write_record
from cbedge.machine import machine
from cbedge.provenance import provenance
from training.command_line import run

TOKENS, PROMPT = 100, 80  # of the report for which models are compared
BATCHES = (1, 4, 16)
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05)
STUDIES = 50_000
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Shape:
    """A model: parameters of the image side and of the language model, and bytes of keys and values for each token."""

    name: str
    image: float
    language: float
    cache_bytes: float


# Parameters from the configurations of the checkpoints; the cache is layers x 2 x key-value width x 2 bytes (fp16).
SHAPES = (
    Shape("mini (ViT-S, SmolLM2-135M cut to 14 layers)", 36e6, 57e6, 14 * 2 * 192 * 4),
    Shape("ViT-g + SmolLM2-1.7B", 1.17e9, 1.71e9, 24 * 2 * 2048 * 2),
    Shape("InstructBLIP-Vicuna-7B", 1.17e9, 6.7e9, 32 * 2 * 4096 * 2),
)


@dataclass(frozen=True)
class Device:
    """A machine: memory bandwidth in bytes per second, and floating-point operations per second."""

    name: str
    bandwidth: float
    flops: float


# From data sheets: memory bandwidth, and dense fp16 tensor arithmetic.
PAPER = (
    Device("RTX A4000 (16 GB)", 448e9, 77e12),
    Device("RTX 4090 (24 GB)", 1008e9, 165e12),
    Device("H100 SXM (80 GB)", 3350e9, 989e12),
)


def report_seconds(shape: Shape, device: Device, bits: float, batch: int = 1) -> dict[str, float]:
    """Least seconds of a report of :data:`TOKENS` tokens in a batch, by part, with ``bits`` for each weight.

    In each step, decoding reads the weights once for the whole batch, and the keys and values of each report.
    """
    image = batch * 2 * shape.image * 257 / device.flops  # a pass over 257 patches
    prefill = max(batch * 2 * shape.language * PROMPT / device.flops, shape.language * bits / 8 / device.bandwidth)
    length = PROMPT + TOKENS / 2
    step = max(
        (shape.language * bits / 8 + batch * length * shape.cache_bytes) / device.bandwidth,
        batch * 2 * shape.language / device.flops,
    )
    whole = image + prefill + TOKENS * step
    return {"image": image, "prefill": prefill, "decode": TOKENS * step, "whole": whole, "report": whole / batch}


def arithmetic_rate() -> float:
    """Floating-point operations per second of an fp32 matrix product on this machine: the best of five."""
    a = np.ones((2048, 2048), np.float32)
    best = np.inf
    for _ in range(5):
        start = perf_counter()
        a @ a
        best = min(best, perf_counter() - start)
    return 2 * 2048**3 / best


def draw_service(milliseconds: dict[str, float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds of ``count`` drafts, drawn from the measured distribution, linear between its quantiles."""
    known = [milliseconds[name] for name in ("least", "median", "p95", "p99", "most")]
    return np.interp(rng.random(count), (0, 0.5, 0.95, 0.99, 1), known) / 1000


def simulate(service: np.ndarray, per_second: float, workers: int, rng: np.random.Generator) -> np.ndarray:
    """Waiting time of each study in seconds, with ``workers`` machines, first come first served."""
    arrivals = np.cumsum(rng.exponential(1 / per_second, len(service)))
    free = [0.0] * workers
    waits = np.empty(len(service))
    for i, (arrival, seconds) in enumerate(zip(arrivals, service, strict=True)):
        begin = max(arrival, heapq.heappop(free))
        waits[i] = begin - arrival
        heapq.heappush(free, begin + seconds)
    return waits


def measure(latency: dict[str, Any], workers: int, seed: int = 0) -> dict[str, Any]:
    """The record, from the record of ``cbedge bench``."""
    row = latency["variants"][0]
    here = Device(
        f"this machine ({latency['machine']['processor']}, {latency['machine']['cores']} cores)",
        latency["machine"]["read_bandwidth_gb_s"] * 1e9,
        arithmetic_rate(),
    )
    steps = row["new_tokens"] / (row["tokens_per_pass"] or 1)
    decode = row["ms"]["decode"]["median"] / 1000
    floor = steps * row["bytes_per_pass"] / here.bandwidth
    papers = [
        {
            "model": shape.name,
            "device": device.name,
            "bits": bits,
            "batch": batch,
            **report_seconds(shape, device, bits, batch),
        }
        for shape in SHAPES
        for device in (here, *PAPER)
        for bits in (16, 4.5)
        for batch in BATCHES
    ]
    rng = np.random.default_rng(seed)
    service = draw_service(row["ms"]["total"], STUDIES, rng)
    capacity = workers / service.mean()
    queue = []
    for load in LOADS:
        waits = simulate(service, load * capacity, workers, rng)
        queue.append(
            {
                "load": load,
                "reports_per_hour": 3600 * load * capacity,
                "wait_p50_s": float(np.median(waits)),
                "wait_p95_s": float(np.quantile(waits, 0.95)),
                "wait_p99_s": float(np.quantile(waits, 0.99)),
                "grows": load >= 1,
            }
        )
    return {
        "machine": machine(here.bandwidth),
        "latency_of": latency["machine"],
        "model": latency["model"],
        "variant": row["variant"],
        "workers": workers,
        "arithmetic_gflops": here.flops / 1e9,
        "roofline": {
            "bytes_per_pass": row["bytes_per_pass"],
            "passes": steps,
            "decode_floor_s": floor,
            "decode_s": decode,
            "share_of_bandwidth": floor / decode,
        },
        "paper": papers,
        "reports_per_hour": 3600 * capacity,
        "burst_of_200_s": float(service[:200].sum() / workers),
        "queue": queue,
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    roof, where = record["roofline"], record["latency_of"]
    lines = [
        "# Roofline and scale",
        "",
        f"Command: `{record['command']}`",
        "",
        f"{record['model']}, {record['variant']}; latency measured on {where['processor']}, {where['cores']} cores, "
        f"{where['read_bandwidth_gb_s']} GB/s; fp32 arithmetic {record['arithmetic_gflops']:.0f} GFLOP/s.",
        "",
        "## Measured",
        "",
        f"A pass of the language model reads {roof['bytes_per_pass'] / 1e6:.1f} MB. The median report takes "
        f"{roof['passes']:.0f} passes: at least {1000 * roof['decode_floor_s']:.0f} ms at full bandwidth; measured: "
        f"{1000 * roof['decode_s']:.0f} ms, {roof['share_of_bandwidth']:.0%} of the bandwidth.",
        "",
        "## Estimated",
        "",
        f"Least time of a report of {TOKENS} tokens after a prompt of {PROMPT}, and reports per hour. 4.5 bits: 4-bit "
        "weights with an fp16 scale for each block of 32.",
        "",
        "| model | machine | bits | batch | s until the batch is done | reports/hour |",
        "| --- |" + " --- |" * 5,
        *[
            f"| {p['model']} | {p['device']} | {p['bits']} | {p['batch']} | {p['whole']:.3f} | "
            f"{3600 / p['report']:,.0f} |"
            for p in record["paper"]
        ],
        "",
        "## The queue",
        "",
        f"Simulated: {STUDIES:,} studies, {record['workers']} worker(s), service times as measured. Capacity: "
        f"{record['reports_per_hour']:,.0f} reports per hour. 200 studies that arrive together are drafted in "
        f"{record['burst_of_200_s']:.0f} s.",
        "",
        "| load | studies/hour | wait p50, s | p95 | p99 |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {q['load']:.0%} | {q['reports_per_hour']:,.0f} | {q['wait_p50_s']:.2f} | {q['wait_p95_s']:.2f} | "
            f"{q['wait_p99_s']:.2f} |" + (" (grows without limit)" if q["grows"] else "")
            for q in record["queue"]
        ],
    ]
    return "\n".join(lines) + "\n"


@app.command(help=__doc__)
def scale_command(
    latency: Annotated[Path, typer.Option(help="Output of `cbedge bench --format json`.")],
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json and OUTPUT.md.")],
    workers: Annotated[int, typer.Option(min=1, help="Workstations that serve one queue.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
) -> None:
    """Write the page."""
    refuse_existing(output.with_suffix(".json"), force)
    try:
        measured = json.loads(latency.read_text(encoding="utf-8"))
        measured["variants"][0]["ms"]["total"], measured["machine"]["read_bandwidth_gb_s"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{latency} was not written by `cbedge bench --format json`: run that first") from None
    if (there := measured["machine"]["processor"]) != (here := machine()["processor"]):
        raise ValueError(f"{latency} was measured on {there}, and this is {here}: run `cbedge bench` here first")
    record = provenance(f"computed from {latency.name}", bundle=False) | measure(measured, workers)
    record["bundle"] = measured.get("bundle")  # the one whose latency this is
    write_record(record, output, to_markdown(record))


if __name__ == "__main__":
    run(app)
