"""A new base model is one file and one entry."""

import importlib
import json
from pathlib import Path

import pytest
from conftest import call_cli

from cbedge import ReportGenerator
from training.base import BASES, load_model
from training.controls import own
from training.datasets import open_studies
from training.drafting import Drafter, TorchDrafter
from training.trained import checkpoint_of, load_adapted

POCKET = """
from dataclasses import replace

import torch
from transformers import InstructBlipForConditionalGeneration, Qwen2Config

from training.base.checkpoint import load_checkpoint
from training.base.parts import Base


def assemble(cache, seed=0, layers=2):
    parts = load_checkpoint(str(cache))
    torch.manual_seed(seed)
    config, old = parts.model.config, parts.model.config.text_config
    config.text_config = Qwen2Config(
        vocab_size=old.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = InstructBlipForConditionalGeneration(config)
    model.language_model.lm_head.weight.data[2] = 0  # never the likeliest token: a random model must not stop at once
    return replace(parts, model=model)


POCKET = Base(assemble, image_side={"layers": 1})
"""

RUN = """
base: pocket
base_options: {layers: 3}
data: data
output: runs/pocket
stages:
  - name: vision
    train: [qformer, query_tokens, projection]
    losses: {tags: 1.0}
    epochs: 0.2
    batch_size: 4
  - name: language
    train: [projection]
    lora: {part: language, r: 16, alpha: 64, targets: [q_proj, v_proj, up_proj, down_proj]}
    losses: {language: 1.0}
    lora_learning_rate: 0.01
    epochs: 20
    batch_size: 4
"""


@pytest.mark.slow
def test_a_new_base_model_is_one_file_and_one_entry(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The module ``pocket.py`` and one entry in ``BASES`` are all that the new base model needs, and nothing else in
    the repository is touched. Its language model is a Qwen2, of a family that no file of the repository names. The
    commands train it in two stages, export it, and the runtime drafts letter for letter what torch drafts.

    What it does not show: other families than those that transformers' InstructBLIP and ONNX Runtime GenAI's model
    builder know, or an encoder-decoder other than T5, need code in ``export``; and a bundle names the base model as a
    whole, not its weights one by one, unless ``--origin`` is given.
    """
    (tmp_path / "pocket.py").write_text(POCKET, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BASES, "pocket", importlib.import_module("pocket").POCKET)

    config, run, out = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "bundle"
    config.write_text(RUN, encoding="utf-8")
    options = ["--data", tiny_data, "--cache", tiny_checkpoint, "--max-steps", 20]
    done = call_cli("training", "run", "--config", config, "--output", run, *options)
    assert done.returncode == 0, done.stderr
    text = json.loads((run / "base" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["num_hidden_layers"]) == ("qwen2", 3)

    done = call_cli("export", "--checkpoint", checkpoint_of(run), "--adapters", run, "--out", out, "--variant", "fp32")
    assert done.returncode == 0, done.stderr
    bundle = Drafter(ReportGenerator.from_pretrained(out, "fp32", "cpu"), "bundle")
    assert [part["origin"] for part in bundle.generator.bundle.manifest.base_weights] == ["pocket"]
    parts = load_adapted(checkpoint_of(run), [run], tiny_checkpoint)
    requests = own(open_studies(tiny_data, ("train", "val", "test")))
    ours, theirs = (one.draft(requests, lambda count: None) for one in (bundle, TorchDrafter(parts)))
    print("DRAFTS", ours[:6], sum(map(bool, ours)), len(ours))
    assert theirs == ours and any(ours)  # a random model writes some empty drafts; which ones, depends on the threads


def test_the_image_side_of_a_base_model_needs_a_small_language_model_only(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "pocket_two.py").write_text(POCKET, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BASES, "pocket", importlib.import_module("pocket_two").POCKET)
    whole, image_side = (load_model("pocket", tiny_checkpoint, image_side=part) for part in (False, True))
    assert [len(parts.model.language_model.model.layers) for parts in (whole, image_side)] == [2, 1]


def test_an_unknown_option_of_a_base_model_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"base_options of mini: unknown option 'depth'; known: vision_layers, "):
        load_model("mini", tmp_path, depth=3)
