import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from test_run import STAGES, losses

from training.config import load_config
from training.settings import ConfigError
from training.train import run
from training.trained import checkpoint_of, load_adapted

pytestmark = pytest.mark.slow


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


def assert_two_find_what_one_finds(config: Path, data: Path, folder: Path, stages: tuple[str, ...]) -> str:
    """Train with one process and with two, and compare; returns what the two said."""
    run(load_config(config, data=data, output=folder / "one", device="cpu"), max_steps=2)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "training",
            "run",
            "--config",
            config,
            "--data",
            data,
            "--output",
            folder / "two",
            "--max-steps",
            "2",
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    for stage in stages:
        one, two = losses(folder / "one" / stage), losses(folder / "two" / stage)
        assert len(one) == len(two) == 2
        for single, double in zip(one, two, strict=True):
            assert double == pytest.approx(single, rel=2e-4, abs=2e-4), stage
    return done.stderr


def test_two_processes_find_the_losses_of_one(config_without_dropout: Path, tiny_data: Path, tmp_path: Path):
    assert_two_find_what_one_finds(config_without_dropout, tiny_data, tmp_path, STAGES)


def test_a_sharded_language_model_is_trained_to_the_same_losses(
    config_without_dropout: Path, tiny_data: Path, tmp_path: Path
):
    settings = yaml.safe_load(config_without_dropout.read_text()) | {"shard": True}
    settings["stages"] = settings["stages"][1:]
    settings["stages"][2]["select_by"] = "cider"  # drafts are written by both, as each holds half
    config = tmp_path / "sharded.yaml"
    config.write_text(yaml.safe_dump(settings))
    said = assert_two_find_what_one_finds(config, tiny_data, tmp_path, STAGES[1:])
    kept, whole = (float(number) for number in re.search(r"language model: (\S+) of (\S+) MB", said).groups())
    assert kept < 0.75 * whole  # embedding and head stay whole, and weigh much in a model as small as this
    one, two = (load_adapted(checkpoint_of(tmp_path / name), [tmp_path / name], tmp_path) for name in ("one", "two"))
    pairs = zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for (_, a), b in pairs)


def test_what_cannot_be_sharded_is_refused(tiny_config: Path, tiny_data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="nf4"):
        load_config(tiny_config, data=tiny_data, output=tmp_path, shard=True, base_precision="nf4")
