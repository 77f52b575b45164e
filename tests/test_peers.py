import json
import shutil
from pathlib import Path

import pytest
from conftest import run_cli

from benchmarks.peers import Job, optimum_runner
from training.trained import checkpoint_of


def test_peers_write_the_same_in_fp32_and_are_set_side_by_side(tiny_run: Path, tiny_bundle: Path, tmp_path: Path):
    names = ("cbedge int4", "cbedge fp32, one token a pass", "transformers fp32")
    done = run_cli(
        "benchmarks.peers", "--checkpoint", checkpoint_of(tiny_run), "--adapters", tiny_run, "--bundle", tiny_bundle,
        "--output", tmp_path / "peers", "--tokens", 6, "--rounds", 2, "--threads", 1,
        *[word for name in names for word in ("--only", name)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "peers.json").read_text())
    assert not record["failed"] and list(record["summary"]) == list(names)
    ours, exact, theirs = record["summary"].values()
    assert ours["whole_ratio"] == [1, 1, 1] and theirs["whole_ratio"][0] > 0
    assert exact["same_characters_as_fp32"] == theirs["same_characters_as_fp32"] > 0
    assert "| cbedge int4 |" in (tmp_path / "peers.md").read_text()
    assert str(tmp_path) not in (tmp_path / "peers.json").read_text()


def test_an_interpreter_without_optimum_is_told_at_once(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    job = Job(tmp_path, tiny_bundle, 1, optimum_python=shutil.which("false"))
    with pytest.raises(RuntimeError, match="did not export"):
        optimum_runner(job)
