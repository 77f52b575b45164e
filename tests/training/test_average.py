import json
from pathlib import Path

import pytest
import torch
from conftest import call_cli

from training.trained import checkpoint_of, load_adapted, merge_adapters


def test_the_mean_of_runs_sees_and_writes_as_they_do(tiny_run: Path, tiny_data: Path, tmp_path: Path):
    mean_folder = tmp_path / "mean"
    done = call_cli(
        "training", "average", "--run", tiny_run, "--run", tiny_run, "--data", tiny_data, "--out", mean_folder
    )
    assert done.returncode == 0, done.stderr
    assert "AUC on validation studies" in done.stdout
    run, mean = (
        load_adapted(*where, tmp_path) for where in ((checkpoint_of(tiny_run), [tiny_run]), (str(mean_folder), []))
    )
    merge_adapters(run)
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, mean.model.state_dict()[name], atol=1e-6), name
    assert run.finding_head is not None and mean.finding_head is not None
    assert torch.allclose(run.finding_head.weight, mean.finding_head.weight)
    assert mean.finding_head.findings.names == run.finding_head.findings.names
    assert mean.reads_lateral and json.loads((mean_folder / "finding_head.json").read_text())["lateral_shares"]
    again = call_cli(
        "training", "average", "--run", tiny_run, "--run", tiny_run, "--data", tiny_data, "--out", mean_folder
    )
    assert again.returncode and "already exists" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(("stranger", "reason"), [(False, "two or more runs"), (True, "they started from")])
def test_what_has_no_mean_is_refused(stranger: bool, reason: str, tiny_run: Path, tiny_data: Path, tmp_path: Path):
    more = []
    if stranger:
        other = tmp_path / "other"
        other.mkdir()
        config = json.loads((tiny_run / "config.json").read_text()) | {"base": "elsewhere"}
        (other / "config.json").write_text(json.dumps(config))
        more = ["--run", other]
    done = call_cli("training", "average", "--run", tiny_run, *more, "--data", tiny_data, "--out", tmp_path / "mean")
    assert done.returncode and reason in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "mean").exists()
