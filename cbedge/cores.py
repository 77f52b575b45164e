"""The number of cores that this process may use, from its CPU affinity and its cgroup's CPU quota (in containers)."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The number of cores to start threads for, at least 1: the smallest of CPU count, affinity and quota.

    By default, ONNX Runtime uses all cores of the machine (onnxruntime issue 29510). Tests replace the root folder.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return own if quota is None else max(1, min(own, round(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU time that the process's cgroups (version 1 or 2) allow, in cores; ``None`` if there is no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found += [_quota(folder / "cpu.max") for folder in _upwards(root / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                for folder in _upwards(root / "sys/fs/cgroup" / mount, path):
                    found.append(_quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    return min((quota for quota in found if quota is not None), default=None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """The folder of a cgroup and its parent folders, each of which may set a limit."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _quota(*files: Path) -> float | None:
    """The limit in a file that holds quota and period (version 2), or in one file for each (version 1)."""
    try:
        quota, period = map(int, " ".join(file.read_text() for file in files).split())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # without a limit, the quota is "max" or -1
        return None
