import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_run import STAGES, losses

from training.config import load_config
from training.train import run


@pytest.fixture
def config_without_dropout(tiny_config: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Dropout draws differ between processes; without it losses can be compared."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    values = json.loads((checkpoint / "config.json").read_text())
    values["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (checkpoint / "config.json").write_text(json.dumps(values))
    settings = yaml.safe_load(tiny_config.read_text()) | {"base": str(checkpoint)}
    for stage in settings["stages"]:
        if "lora" in stage:
            stage["lora"]["dropout"] = 0.0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_two_processes_find_the_losses_of_one(config_without_dropout: Path, tiny_data: Path, tmp_path: Path):
    run(load_config(config_without_dropout, data=tiny_data, output=tmp_path / "one", device="cpu"), max_steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "training", "run", "--config", config_without_dropout, "--data", tiny_data,
         "--output", tmp_path / "two", "--max-steps", "2", "--device", "cpu"],
        capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    for stage in STAGES:
        one, two = losses(tmp_path / "one" / stage), losses(tmp_path / "two" / stage)
        assert len(one) == len(two) == 2
        for single, double in zip(one, two, strict=True):
            assert double == pytest.approx(single, rel=2e-4, abs=2e-4), stage
