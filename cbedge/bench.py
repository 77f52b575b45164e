"""Benchmark of drafts on this machine: time of each stage, memory use, and what limits the speed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from cbedge.api import ReportGenerator
from cbedge.backends import choose_variant
from cbedge.backends.int8 import Table
from cbedge.bench_report import STAGES
from cbedge.bundles.bundle import Bundle, open_bundle
from cbedge.drafting.recent import Recent
from cbedge.errors import OutputError
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.machine import gpu_memory, machine, peak_memory, read_bandwidth
from cbedge.report import Report

Progress = Callable[[str], None]
# A small process between this one and the command: the peak of a child starts with the memory of its parent.
_WATCH = """
import json, subprocess, sys, time
from cbedge.machine import peak_memory
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, stdin=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps([seconds, peak_memory(children=True), done.returncode, done.stdout, done.stderr]))
"""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model, device, threads: as in :meth:`ReportGenerator.from_pretrained`.
        variants: variants of the bundle; empty means the best one for this machine.
        indication: indication of every study.
        tokens: largest number of tokens in a draft; ``None`` lets the model end its reports.
        warm_up: number of untimed drafts before the measurement.
        repeat: number of drafts of each radiograph.
        speculative: use speculative decoding.
    """

    model: Path | None = None
    variants: Sequence[str] = ()
    device: str = "auto"
    threads: int | None = None
    indication: str | None = None
    tokens: int | None = None
    warm_up: int = 2
    repeat: int = 5
    speculative: bool = True


def bench(
    images: Sequence[Radiograph], settings: BenchSettings, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Draft every radiograph several times with each variant, in this process.

    The ``read`` stage of a draft is the time of loading, measured once. ``progress`` gets what is being measured.

    Returns:
        A JSON-ready record: ``machine``, and for each of ``variants`` ``ms`` (median, p95, p99, least and most of every
        stage, of the time to the first token and of the whole draft), ``redraft_ms`` (of a draft of the study that was
        drafted last, :mod:`cbedge.drafting.recent`), ``tokens_per_second``, ``peak_memory_mb`` and others.

    Raises:
        BundleError, DeviceError: as in :meth:`ReportGenerator.from_pretrained`.
    """
    bundle = open_bundle(settings.model)
    names = [bundle.variant(name)[0] for name in settings.variants]
    names = names or [choose_variant(bundle, None, settings.device)[0]]
    progress("memory bandwidth")
    bandwidth = read_bandwidth(settings.threads)
    return {
        "machine": machine(bandwidth),
        "model": f"{bundle.manifest.name} {bundle.manifest.version}",
        "variants": [_measure(name, images, settings, bandwidth, progress) for name in names],
        "images": len(images),
        "repeat": settings.repeat,
        "warm_up": settings.warm_up,
        "max_new_tokens": settings.tokens,
        "speculative": settings.speculative,
    }


def _measure(
    name: str, images: Sequence[Radiograph], settings: BenchSettings, bandwidth: float, progress: Progress
) -> dict[str, Any]:
    """The row of one variant."""
    progress(f"{name}: loading")
    start = perf_counter()
    generator = ReportGenerator.from_pretrained(
        settings.model, name, settings.device, settings.threads, recent_studies=0
    )
    load = perf_counter() - start
    decoding = replace(generator.decoding, speculative=settings.speculative)

    def draft(image: Radiograph) -> Report:
        return generator.generate(
            image,
            indication=settings.indication,
            max_new_tokens=settings.tokens,
            decoding=decoding,
            accept_any_image=True,
        )

    for image in [*images] * settings.warm_up if len(images) < settings.warm_up else images[: settings.warm_up]:
        draft(image)
    drafts = []
    for number in range(settings.repeat):
        progress(f"{name}: round {number + 1} of {settings.repeat}")
        drafts += [draft(image) for image in images]
    row = _row(generator, drafts, load, bandwidth)
    progress(f"{name}: again")
    generator.recent = Recent(1)
    row["redraft_ms"] = _percentiles([draft(image).timings.total for image in images for _ in range(2)][1::2])
    return row


def load_all(paths: Sequence[Path]) -> list[Radiograph]:
    """Load radiographs; without any, a synthetic one."""
    for path in paths[:1]:
        load_radiograph(path)  # imports the reader, so that the first timed draft does not
    return [load_radiograph(path) for path in paths] or [drawn_chest()]


def drawn_chest() -> Radiograph:
    """A synthetic image, two dark lungs in a bright body: suitable for timing only."""
    y, x = np.mgrid[0:512, 0:512] / 512
    pixels = np.full((512, 512), 0.8)
    for centre in (0.3, 0.7):
        pixels -= 0.5 * np.exp(-((((x - centre) / 0.13) ** 2 + ((y - 0.5) / 0.28) ** 2) ** 2))
    return load_radiograph((255 * pixels).astype(np.uint8))


def cold_start(image: Path | None, model: Path | None, variant: str, repeat: int) -> dict[str, Any]:
    """Run ``cbedge generate`` repeatedly in new processes: median seconds, and peak memory in MB.

    Raises:
        OutputError: the command fails; the message has its error message.
    """
    scratch = tempfile.TemporaryDirectory()
    if image is None:
        image = Path(scratch.name) / "chest.png"
        Image.fromarray((255 * drawn_chest().pixels).astype(np.uint8)).save(image)
    command = [sys.executable, "-m", "cbedge.cli", "generate", str(image), "--json", "--device", "cpu"]
    command += ["--variant", variant]
    command += ["--accept-any-image", *(["--model", str(model)] if model else [])]
    seconds, first, peaks = [], [], []
    for _ in range(repeat):
        watched = subprocess.run(
            [sys.executable, "-c", _WATCH, *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        took, peak, code, out, err = json.loads(watched.stdout)
        if code:
            raise OutputError(f"cbedge generate failed: {(err.strip().splitlines() or ['no message'])[-1]}")
        seconds.append(took)
        peaks.append(peak)
        first.append(took - json.loads(out)["timings_ms"]["decode"] / 1000)
    scratch.cleanup()
    return {
        "variant": variant,
        "runs": repeat,
        "command_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "first_token_s": statistics.median(first),
        "peak_memory_mb": max(peaks),
    }


def _row(generator: ReportGenerator, drafts: list[Report], load: float, bandwidth: float) -> dict[str, Any]:
    spans = {stage: [asdict(d.timings)[stage] for d in drafts] for stage in STAGES}
    first = [sum(asdict(d.timings)[stage] for stage in ("read", "vision", "qformer", "prefill")) for d in drafts]
    # The stop token counts; opening tokens do not, because they were not generated.
    written = [max(1, d.new_tokens - d.opening_tokens + d.complete) for d in drafts]
    # Without speculative decoding, each token but the first needs a pass. With it, a pass yields one token and the
    # accepted guesses, some of which the sentence filter may remove.
    decoded = [max(d.passes + d.accepted_tokens, n - 1) for n, d in zip(written, drafts, strict=True)]
    passes = [d.passes or n for n, d in zip(decoded, drafts, strict=True)]
    decode_s = [max(d.timings.decode, 1e-3) / 1000 for d in drafts]
    read = _bytes_per_pass(generator.bundle, generator.variant, statistics.fmean(d.prompt_tokens for d in drafts))
    used = statistics.median(read * n / s for n, s in zip(passes, decode_s, strict=True))
    guessed = sum(d.guessed_tokens for d in drafts)
    return {
        "variant": generator.variant,
        "device": generator.backend.device,
        "threads": generator.backend.threads,
        "drafts": len(drafts),
        "load_s": round(load, 3),
        "ms": {name: _percentiles(values) for name, values in {**spans, "first token": first}.items()},
        "prompt_tokens": statistics.median(d.prompt_tokens for d in drafts),
        "new_tokens": statistics.median(d.new_tokens for d in drafts),
        "tokens_per_second": _percentiles([n / s for n, s in zip(decoded, decode_s, strict=True)]),
        # None if the drafts consist of openings only: nothing was decoded.
        "tokens_per_pass": round(sum(decoded) / sum(passes), 2) if sum(passes) else None,
        "guesses_accepted": round(sum(d.accepted_tokens for d in drafts) / guessed, 3) if guessed else None,
        "bytes_per_pass": read,
        "bandwidth_share": round(used / bandwidth, 3) if generator.backend.device == "cpu" else None,
        "peak_memory_mb": peak_memory(),
        "gpu_memory_mb": gpu_memory() if generator.backend.device == "cuda" else None,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    p95, p99 = np.percentile(values, (95, 99))
    found = {"median": statistics.median(values), "p95": p95, "p99": p99, "least": min(values), "most": max(values)}
    return {name: round(float(value), 3) for name, value in found.items()}


def _bytes_per_pass(bundle: Bundle, variant: str, length: float) -> int:
    """Bytes that one decoder pass reads: all weights, and the KV cache."""
    chosen = bundle.manifest.variants[variant]
    graphs = {chosen.graphs["decoder_model_merged"]} if chosen.graphs else set(chosen.data)
    names = graphs | {n for n in chosen.data if n.startswith("decoder_model_merged")}
    tables = [Table.read(bundle.folder / name) for name in names if name.endswith(".json")]
    wider = sum(p.rows * p.columns - p.stored_bytes for table in tables for p in table.products)  # made at loading
    shapes = bundle.manifest.shapes
    cache = 2 * shapes.num_layers * shapes.num_key_value_heads * shapes.head_size * 4 * length
    return int(sum(bundle.manifest.files[name].size for name in names) + wider + cache)
