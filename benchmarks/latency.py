"""Wall time of a draft in a warm process, cold start of the command line, and peak memory, on this machine."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from cbedge import ReportGenerator, Timings
from cbedge.radiograph import load_radiograph

WARM_UP = 2
STAGES = tuple(f.name for f in fields(Timings))


def measure_warm(
    model: Path | None, images: Sequence[Path], indication: str, device: str, threads: int | None, tokens: int | None
) -> dict[str, Any]:
    """Draft every image once in one process, after two drafts to warm up.

    Args:
        model: folder of a bundle; ``None`` is the embedded one.
        images: radiographs, one draft each.
        indication: given with every one of them.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; ``None`` is one a core.
        tokens: stop every draft after so many tokens; ``None`` lets the model end its reports.

    Returns:
        ``ms``: median, 5th and 95th percentile of the whole and of each stage, in milliseconds; ``new_tokens`` and
        ``prompt_tokens`` (medians), ``tokens_per_second`` (median of the decoding rate).
    """
    generator = ReportGenerator.from_pretrained(model, device=device, threads=threads)
    for image in list(images)[:WARM_UP]:
        generator.generate(image, indication=indication, max_new_tokens=tokens)
    drafts = [generator.generate(image, indication=indication, max_new_tokens=tokens) for image in images]
    spans = [asdict(draft.timings) for draft in drafts]
    rates = [1000 * (d.new_tokens - 1) / d.timings.decode for d in drafts if d.timings.decode and d.new_tokens > 1]
    return {
        "drafts": len(drafts),
        "ms": {stage: _spread([span[stage] for span in spans]) for stage in STAGES},
        "prompt_tokens": statistics.median(d.prompt_tokens for d in drafts),
        "new_tokens": statistics.median(d.new_tokens for d in drafts),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "model": f"{drafts[0].model} {drafts[0].model_version} {drafts[0].variant}",
        "device": generator.backend.device,
    }


def measure_cold(model: Path | None, image: Path, indication: str, repeats: int) -> dict[str, Any]:
    """``cbedge generate`` in a process of its own, again and again: seconds of wall time, and peak resident memory.

    Raises:
        RuntimeError: the command fails; the message holds what it said.
    """
    command = [sys.executable, "-m", "cbedge.cli", "generate", str(image), "--indication", indication, "--json"]
    command += ["--device", "cpu"] + (["--model", str(model)] if model else [])
    seconds, first_text = [], []
    for _ in range(repeats):
        start = perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        seconds.append(perf_counter() - start)
        if done.returncode:
            raise RuntimeError(f"cbedge generate failed: {done.stderr.strip()}")
        first_text.append(seconds[-1] - json.loads(done.stdout)["timings_ms"]["decode"] / 1000)
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return {
        "runs": repeats,
        "whole_command_s": _spread(seconds),
        "until_first_token_s": _spread(first_text),
        "peak_memory_mb": peak / 1e6,
    }


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, cores that this process may use, memory, versions, date."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("cbedge", "onnxruntime", "onnxruntime-gpu", "numpy")},
        "date": date.today().isoformat(),
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    warm, cold, where = record["warm"], record["cold"], record["machine"]
    lines = [
        f"# Latency: {warm['model']} on {warm['device']}", "",
        f"{where['date']}, {where['processor']}, {where['cores']} cores, Python {where['python']}, "
        + ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v) + f". Command: `{record['command']}`", "",
        f"Warm process, {warm['drafts']} radiographs, median {warm['prompt_tokens']:.0f} tokens read and "
        f"{warm['new_tokens']:.0f} written, {warm['tokens_per_second']:.0f} tokens/s while decoding.", "",
        "| stage | median ms | 5th to 95th percentile |", "| --- | --- | --- |",
        *[f"| {stage} | {s['median']:.1f} | {s['p5']:.1f} to {s['p95']:.1f} |" for stage, s in warm["ms"].items()],
    ]  # fmt: skip
    if cold:
        whole, first = cold["whole_command_s"], cold["until_first_token_s"]
        lines += ["", f"Cold start, `cbedge generate` in a new process, {cold['runs']} runs: median "
                  f"{whole['median']:.2f} s for the whole command, {first['median']:.2f} s until the first token; peak "
                  f"resident memory {cold['peak_memory_mb']:.0f} MB."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p5": 0.05, "p95": 0.95}
    return {"median": statistics.median(ordered)} | {
        name: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for name, share in at.items()
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_images(images: Sequence[Path]) -> None:
    """Read every image once, so that a wrong one is told before anything is measured.

    Raises:
        RadiographError: one cannot be used.
    """
    for image in images:
        load_radiograph(image)
