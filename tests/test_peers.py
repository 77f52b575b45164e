import json
import shutil
from pathlib import Path

import pytest
from conftest import call_cli

from benchmarks.peer_runners import Job, optimum_runner
from training.trained import checkpoint_of

pytestmark = pytest.mark.slow


def test_peers_write_the_same_in_fp32_and_are_set_side_by_side(tiny_run: Path, tiny_bundle: Path, tmp_path: Path):
    names = ("cbedge int4", "cbedge fp32, one token a pass", "transformers fp32")
    done = call_cli(
        "benchmarks.peers",
        "--checkpoint",
        checkpoint_of(tiny_run),
        "--adapters",
        tiny_run,
        "--bundle",
        tiny_bundle,
        "--output",
        tmp_path / "peers",
        "--tokens",
        6,
        "--rounds",
        2,
        "--threads",
        1,
        *[word for name in names for word in ("--only", name)],
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "peers.json").read_text())
    assert not record["failed"] and list(record["summary"]) == list(names)
    ours, exact, theirs = record["summary"].values()
    assert ours["whole_ratio"] == [1, 1, 1] and theirs["whole_ratio"][0] > 0
    assert exact["same_characters_as_fp32"] == theirs["same_characters_as_fp32"] > 0
    assert "| cbedge int4 |" in (tmp_path / "peers.md").read_text()
    assert str(tmp_path) not in (tmp_path / "peers.json").read_text()


def test_studies_reports_are_as_long_as_fp32_writes_them(
    tiny_run: Path, tiny_bundle: Path, tiny_data: Path, tmp_path: Path
):
    def peers(output: str, bundle: Path, data: Path):
        return call_cli(
            "benchmarks.peers",
            "--checkpoint",
            checkpoint_of(tiny_run),
            "--adapters",
            tiny_run,
            "--bundle",
            bundle,
            "--data",
            data,
            "--output",
            tmp_path / output,
            "--rounds",
            3,
            "--threads",
            1,
            "--only",
            "cbedge fp32, one token a pass",
            "--only",
            "cbedge int4",
        )

    done = peers("peers", tiny_bundle, tiny_data)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "peers.json").read_text())
    assert record["rounds"] == 3 and 1 <= record["tokens"][0] <= record["tokens"][2]
    assert "# Reports of 3 studies" in (tmp_path / "peers.md").read_text() or len({*record["tokens"]}) == 1
    assert (
        f"--data {tiny_data.name} " in record["command"] and str(tmp_path) not in (tmp_path / "peers.json").read_text()
    )
    assert call_cli("export.revise", tiny_bundle, "--out", tmp_path / "b", "--keep", "int4").returncode == 0
    for bundle, data, reason in ((tmp_path / "b", tiny_data, "fp32"), (tiny_bundle, tmp_path, str(tmp_path))):
        refused = peers("other", bundle, data)
        assert refused.returncode == 1 and reason in refused.stderr and "Traceback" not in refused.stderr


def test_an_interpreter_without_optimum_is_told_at_once(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    job = Job(tmp_path, tiny_bundle, 1, optimum_python=shutil.which("false"))
    with pytest.raises(RuntimeError, match="did not export"):
        optimum_runner(job)
