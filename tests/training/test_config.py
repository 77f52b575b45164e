from pathlib import Path

import pytest
from conftest import ROOT

from training.config import load_config
from training.settings import ConfigError

MINI = ROOT / "training" / "configs" / "iu_xray_mini.yaml"


def test_the_mini_configuration_has_its_stages_in_order():
    config = load_config(MINI, data="somewhere")
    assert [stage.name for stage in config.stages] == ["align", "vision", "wording", "language"]
    assert [stage.lora and stage.lora.part for stage in config.stages] == [None, "vision", "language", "language"]
    assert config.data == Path("somewhere")


@pytest.mark.parametrize(
    "path", sorted({*MINI.parent.glob("*.yaml")} - {*MINI.parent.glob("encoder*.yaml")}), ids=lambda path: path.stem
)
def test_every_configuration_that_ships_is_valid(path: Path):
    assert load_config(path, data="somewhere").stages[-1].lora.part == "language"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("surprise: 1", "unknown key 'surprise'"),
        ("stages: all", "c.yaml: stages: 'all' is not allowed; it should be a valid list"),
        ("stages: [{losses: {language: 1}}]", "c.yaml, stage 1: name is missing; set it there$"),
        (
            "stages: [{name: a, losses: {magic: 1}}]",
            "losses: 'magic' is not allowed; .* 'contrastive', 'tags'",
        ),
        (
            "stages: [{name: a, losses: {language: 1}, train: [ear]}]",
            "a: train: 'ear' is not .*'query_tokens' or",
        ),
        (
            "stages: [{name: a, losses: {language: 1}, lora: {part: ear, targets: [x]}}]",
            "lora.part: 'ear' is not",
        ),
        (
            "stages: [{name: a, losses: {language: 1}, lora: {part: vision, targets: [x], q: 1}}]",
            "known: alpha, ",
        ),
        (
            "stages: [{name: a, losses: {language: 1}, tell_findings: [gout]}]",
            "tell_findings: 'gout' .*'effusion'",
        ),
        (
            "stages: [{name: a, losses: {language: 1}, batch_size: 0}]",
            "batch_size: 0 is not .* greater than or equal",
        ),
        ("stages: [{name: a, losses: {language: 1}, epochs: two}]", "epochs: 'two' is not .* a valid number"),
        ("base: [", "c.yaml is not valid YAML: while parsing"),
        ("data: ", "c.yaml: data is missing; set it there, or give --data"),
        (
            "stages: [{name: a, losses: {language: 1}, schedule: step}]",
            "schedule: 'step' .* 'linear' or 'constant'",
        ),
        ("stages: [{name: a, losses: {language: 1}, patience: 2}]", "patience needs select_by"),
        ("stages: [{name: a, losses: {language: 1}, select_by: tags}]", "select_by tags needs the tags loss"),
        ("stages: [{name: a, losses: {language: 1}, tell_from: rumour}]", "tell_from: 'rumour' .* 'tags' or 'report'"),
        ("base_precision: int2", "base_precision: 'int2' .* 'fp32', 'bf16' or 'nf4'"),
        ("base_precision: nf4\nprecision: fp32", "needs precision bf16"),
        ("validation_studies: 0", "validation_studies: 0 is not allowed; it should be greater"),
        ("stages: [{name: a, losses: {tags: 1}, image_blind: true}]", "image-blind stage has the language loss alone"),
        (
            "stages: [{name: a, losses: {language: 1}, lora: {part: vision, targets: [fc1]}}, "
            "{name: b, losses: {language: 1}, lora: {part: vision, r: 4, targets: [fc1]}}]",
            "stage b: an earlier stage has LoRA on vision with other settings",
        ),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, change: str, told: str):
    path = tmp_path / "c.yaml"
    lines = {"base": "mini", "data": "d", "output": "o", "stages": "[{name: a, losses: {language: 1}}]"}
    key, _, value = change.partition(": ")
    path.write_text("\n".join(f"{k}: {v}" for k, v in {**lines, key: value}.items()))
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(path, data=None)
    assert "\n" not in str(caught.value)
