import json
import shutil
from pathlib import Path

import pytest
from conftest import call_cli

from training.ablation import CELLS, Cell, cell_config
from training.config import load_config

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java, which is not installed here")


def test_cells_differ_in_stages_and_priors_and_in_nothing_else(tiny_config: Path, tmp_path: Path):
    config = load_config(tiny_config)
    stages = {cell.name: [s.name for s in cell_config(config, cell, tmp_path).stages] for cell in CELLS}
    assert len(stages) == 8
    assert stages["none-priors"] == ["align"]
    assert stages["vision-priors"] == ["align", "vision"]
    assert stages["language-no-priors"] == ["align", "wording", "language"]
    assert stages["both-priors"] == [s.name for s in config.stages]
    assert {s.prior_dropout for s in cell_config(config, Cell("both", False), tmp_path).stages} == {1.0}
    assert cell_config(config, Cell("both", True), tmp_path).stages == config.stages


@pytest.mark.slow
@needs_java
def test_the_ablation_trains_scores_and_goes_on(tiny_config: Path, tiny_data: Path, tmp_path: Path):
    arguments = (
        "training",
        "ablate",
        "--config",
        tiny_config,
        "--data",
        tiny_data,
        "--runs",
        tmp_path / "runs",
        "--output",
        tmp_path / "table",
        "--max-steps",
        1,
        "--limit",
        3,
        "--cell",
        "none-priors",
        "--device",
        "cpu",
    )
    done = call_cli(*arguments)
    assert done.returncode == 0, done.stderr
    align = tmp_path / "runs" / "none-priors" / "align"
    first = (align / "trained.safetensors").stat().st_mtime_ns
    more = call_cli(*arguments, "--cell", "vision-priors", "--force")
    assert more.returncode == 0, more.stderr
    assert (align / "trained.safetensors").stat().st_mtime_ns == first, "a cell that was scored is not run again"
    shared = tmp_path / "runs" / "vision-priors" / "align"
    assert (shared / "loss.csv").read_bytes() == (align / "loss.csv").read_bytes(), "a stage in common is trained once"
    record = json.loads((tmp_path / "table.json").read_text())
    assert set(record["cells"]) == {"none-priors", "vision-priors"}
    assert "| vision | on |" in (tmp_path / "table.md").read_text()


def test_an_unknown_cell_is_named(tiny_config: Path, tmp_path: Path):
    done = call_cli(
        "training",
        "ablate",
        "--config",
        tiny_config,
        "--runs",
        tmp_path / "r",
        "--output",
        tmp_path / "o",
        "--cell",
        "all",
    )
    assert done.returncode == 1 and "unknown cell 'all'" in done.stderr and not (tmp_path / "r").exists()
