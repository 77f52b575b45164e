from pathlib import Path

import pytest

from cbedge.cores import cpu_quota, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
          "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n2:memory:/y\n",
          "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "150000\n",
          "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_is_read(files: dict[str, str], quota: float | None, tmp_path: Path):
    assert cpu_quota(write(tmp_path, files)) == quota


def test_no_more_threads_than_the_quota_allows_and_at_least_one(tmp_path: Path):
    limits = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}
    assert usable_cores(write(tmp_path, limits)) == 1
    assert usable_cores(tmp_path / "none") >= 1
