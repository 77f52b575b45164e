"""The conditions of a measurement: processor, memory, GPU, versions; and what a process uses of them."""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from cbedge import __version__
from cbedge.cores import usable_cores

_BUFFER_BYTES = 256 * 2**20


def machine(bandwidth: float | None = None) -> dict[str, Any]:
    """The conditions of a measurement: processor, usable cores, memory, versions, date."""
    cores = usable_cores()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gb": _memory_gb(),
        "gpu": _nvidia_smi("--query-gpu=name"),
        "read_bandwidth_gb_s": None if bandwidth is None else round(bandwidth / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"cbedge": __version__}
        | {n: v for n in ("onnxruntime", "onnxruntime-gpu", "numpy") if (v := _version(n))},
        "date": date.today().isoformat(),
    }


def read_bandwidth(threads: int | None = None) -> float:
    """Memory read bandwidth of all cores in bytes per second: the best of five passes over 256 MB."""
    count = threads or usable_cores()
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8), count)
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(5):
            start = perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BUFFER_BYTES / (perf_counter() - start))
    return best


def peak_memory(children: bool = False) -> float:
    """Peak resident memory of this process, or of its finished children, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes there, kilobytes elsewhere
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return round(usage.ru_maxrss * unit / 1e6, 1)


def gpu_memory() -> float | None:
    """Memory that this process uses on the GPU, in MB; ``None`` if it cannot be read."""
    for line in (_nvidia_smi("--query-compute-apps=pid,used_memory", first=False) or "").splitlines():
        process, _, used = line.partition(",")
        if process.strip() == str(os.getpid()) and used.split():
            return float(used.split()[0]) * 2**20 / 1e6
    return None


def _nvidia_smi(query: str, first: bool = True) -> str | None:
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return None if done.returncode or not text else text.splitlines()[0] if first else text


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
