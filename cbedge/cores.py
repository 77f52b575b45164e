"""How many cores this process may use: its affinity, and the CPU quota of its cgroup (containers have one)."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores to plan threads for, at least 1: the least of the machine's, the affinity's and the quota's.

    ONNX Runtime by itself counts the machine's cores (onnxruntime issue 29510).

    Args:
        root: of the file system, for tests.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return own if quota is None else max(1, min(own, round(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The cores' worth of time that the process's cgroups allow, of version 1 or 2; ``None`` for no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found += [_quota_v2(folder) for folder in _upwards(root / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                found += [_quota_v1(folder) for folder in _upwards(root / "sys/fs/cgroup" / mount, path)]
    limits = [quota for quota in found if quota is not None]
    return min(limits, default=None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """A cgroup's folder and those above it, each of which may have a limit."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
