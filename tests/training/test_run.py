import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import call_cli
from safetensors.torch import load_file

from training.base import load_model
from training.config import load_config
from training.train import run
from training.trained import checkpoint_of, load_adapted, merge_adapters, stage_folders

STAGES = ("align", "wording", "vision", "language")


def losses(folder: Path) -> list[dict[str, float]]:
    with open(folder / "loss.csv", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_every_stage_leaves_adapters_logs_and_a_curve(tiny_run: Path):
    assert [folder.name for folder in stage_folders(tiny_run)] == list(STAGES)
    for stage in STAGES:
        assert len(losses(tiny_run / stage)) == 2
        assert (tiny_run / stage / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert (tiny_run / stage / "validation.csv").is_file()
    for stage, part in (("wording", "language"), ("vision", "vision"), ("language", "language")):
        folder = tiny_run / stage / "adapters" / part
        assert (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()


def test_each_stage_trains_what_it_names_and_nothing_else(tiny_run: Path):
    align = load_file(tiny_run / "align" / "trained.safetensors")
    assert any(name.startswith("qformer.") for name in align) and "query_tokens" in align
    language = load_file(tiny_run / "language" / "trained.safetensors")
    assert all(name.startswith("language_projection.") for name in language)
    vision = load_file(tiny_run / "vision" / "trained.safetensors")
    assert not torch.equal(vision["query_tokens"], align["query_tokens"])
    assert not (tiny_run / "wording" / "trained.safetensors").exists()


def test_a_later_stage_trains_the_same_adapters_on(tiny_run: Path):
    begun = load_file(tiny_run / "wording" / "adapters" / "language" / "adapter_model.safetensors")
    went_on = load_file(tiny_run / "language" / "adapters" / "language" / "adapter_model.safetensors")
    moved = [(begun[name] - went_on[name]).abs().max() for name in begun]
    started = [begun[name].abs().max() for name in begun if "lora_B" in name]
    assert begun.keys() == went_on.keys() and min(started) > 0  # zero where LoRA is put on anew
    assert 0 < max(moved) < 0.01


def test_an_image_blind_stage_reads_no_image(tiny_config: Path, tiny_data: Path, tmp_path: Path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for image in (data / "images").iterdir():
        image.write_bytes(b"")
    values = yaml.safe_load(tiny_config.read_text())
    values["stages"] = [stage for stage in values["stages"] if stage["name"] == "wording"]
    config = tmp_path / "blind.yaml"
    config.write_text(yaml.safe_dump(values))
    run(load_config(config, data=data, output=tmp_path / "run"), max_steps=1)
    assert len(losses(tmp_path / "run" / "wording")) == 1


def one_stage(tiny_config: Path, tmp_path: Path, name: str, **settings: object) -> Path:
    values = yaml.safe_load(tiny_config.read_text())
    values["stages"] = [stage | settings for stage in values["stages"] if stage["name"] == name]
    config = tmp_path / "one.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def test_the_best_weights_are_kept_and_a_stage_that_gets_worse_ends_early(
    tiny_config: Path, tiny_data: Path, tmp_path: Path
):
    worse = {"learning_rate": 10.0, "lora_learning_rate": 10.0, "warmup_steps": 1, "epochs": 8}
    config = one_stage(tiny_config, tmp_path, "language", validate_every=1, select_by="language", patience=2, **worse)
    run(load_config(config, data=tiny_data, output=tmp_path / "run"))
    folder = tmp_path / "run" / "language"
    with open(folder / "validation.csv", encoding="utf-8") as file:
        seen = [float(row["language"]) for row in csv.DictReader(file)]
    best = seen.index(min(seen)) + 1
    assert len(losses(folder)) == len(seen) == best + 2 < 16, "two validations without a better one"
    assert f"best of step {best}" in (folder / "finished").read_text() and not (folder / "best.pt").exists()
    config = one_stage(tiny_config, tmp_path, "language", **worse)
    run(load_config(config, data=tiny_data, output=tmp_path / "short"), max_steps=best)
    kept = load_file(folder / "trained.safetensors")
    wanted = load_file(tmp_path / "short" / "language" / "trained.safetensors")
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_stage_can_be_selected_by_cider_and_checkpoint_its_gradients(
    tiny_config: Path, tiny_data: Path, tmp_path: Path
):
    plain = one_stage(tiny_config, tmp_path, "vision")
    run(load_config(plain, data=tiny_data, output=tmp_path / "plain"), max_steps=1)
    config = one_stage(tiny_config, tmp_path, "vision", select_by="cider", gradient_checkpointing=True)
    run(load_config(config, data=tiny_data, output=tmp_path / "run"), max_steps=1)
    with open(tmp_path / "run" / "vision" / "validation.csv", encoding="utf-8") as file:
        assert [float(row["cider"]) >= 0 for row in csv.DictReader(file)] == [True]
    same = [losses(tmp_path / name / "vision")[0]["language"] for name in ("plain", "run")]
    assert same[0] == pytest.approx(same[1], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_base_in_few_bits_is_trained_resumed_and_merged_into_its_full_weights(
    tiny_config: Path, tiny_data: Path, tiny_checkpoint: Path, tmp_path: Path, precision: str
):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    values = yaml.safe_load(tiny_config.read_text()) | {"base_precision": precision}
    values["stages"] = [stage for stage in values["stages"] if stage["name"] in ("vision", "language")]
    config = tmp_path / "few.yaml"
    config.write_text(yaml.safe_dump(values))
    folder = run(load_config(config, data=tiny_data, output=tmp_path / "run"), max_steps=2)
    trained = load_file(folder / "vision" / "trained.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert not (folder / "base").exists() and checkpoint_of(folder) == str(tiny_checkpoint)
    parts = load_adapted(checkpoint_of(folder), [folder], tmp_path)
    merge_adapters(parts)
    weights = [weight for weight in parts.model.state_dict().values() if weight.is_floating_point()]
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_gradients_pass_a_4_bit_language_model_that_was_evaluated_before(tiny_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    model = load_model(str(tiny_checkpoint), tmp_path, "nf4").model.language_model.requires_grad_(False)
    embeds = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(inputs_embeds=embeds)
    embeds.requires_grad_(True)
    model.train()(inputs_embeds=embeds).logits.float().square().sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_an_interrupted_run_goes_on_to_the_same_losses(tiny_config: Path, tiny_data: Path, tmp_path: Path, monkeypatch):
    from training import train

    config = load_config(tiny_config, data=tiny_data, output=tmp_path / "whole")
    run(config, max_steps=3)
    config = load_config(tiny_config, data=tiny_data, output=tmp_path / "cut")
    real = train.StageRun._train_step
    calls = iter(range(100))

    def killed(self):
        if next(calls) == 7:  # in the middle of the third stage, after its first checkpoint
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(train.StageRun, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, max_steps=3)
    monkeypatch.setattr(train.StageRun, "_train_step", real)
    assert not (tmp_path / "cut" / "vision" / "finished").exists()
    run(config, max_steps=3)
    for stage in STAGES:
        whole, cut = losses(tmp_path / "whole" / stage), losses(tmp_path / "cut" / stage)
        assert [row["step"] for row in whole] == [row["step"] for row in cut] == [1, 2, 3][: len(whole)]
        for a, b in zip(whole, cut, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_another_configuration_does_not_touch_a_run(tiny_config: Path, tiny_data: Path, tiny_run: Path, tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text(tiny_config.read_text().replace("batch_size: 4", "batch_size: 3"))
    done = call_cli("training", "run", "--config", other, "--data", tiny_data, "--output", tiny_run)
    assert done.returncode == 1 and "another configuration" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "training/configs/iu_xray_mini.yaml", "--data", "nowhere"], "studies.jsonl"),
        (["--config", "training/configs/iu_xray_mini.yaml", "--device", "cuda"], "CUDA"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], told: str, tmp_path: Path):
    if told == "CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = call_cli("training", "run", "--output", tmp_path / "run", *options)
    assert done.returncode == 1 and told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_an_instructblip_checkpoint_in_the_hubs_layout_loads_and_takes_adapters(tiny_checkpoint: Path, tiny_run: Path):
    plain = load_adapted(str(tiny_checkpoint), [], tiny_checkpoint)
    assert type(plain.model).__name__ == "InstructBlipForConditionalGeneration"
    adapted = load_adapted(str(tiny_checkpoint), [tiny_run], tiny_checkpoint)
    names = [name for name, _ in adapted.model.named_parameters() if "lora_A" in name]
    assert any(name.startswith("vision_model") for name in names)
    assert any(name.startswith("language_model") for name in names)


def test_an_unfinished_run_is_named(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither a run"):
        load_adapted(str(tiny_checkpoint), [tmp_path], tiny_checkpoint)
