"""Read some layers of a language model's checkpoint, with their adapters merged."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from export.tracing import ExportError
from training.trained import stage_folders


class LanguageWeights:
    """The language model's weights in a folder of safetensors, read one tensor at a time.

    Args:
        folder: an InstructBLIP checkpoint, or only a language model.

    Raises:
        ExportError: the folder has no safetensors.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ExportError(f"{folder} has no .safetensors: save the checkpoint in that format")
        self._names: dict[Path, list[str]] = {}
        for path in files:
            with safe_open(str(path), "pt") as file:
                self._names[path] = list(file.keys())
        # In an InstructBLIP checkpoint, "language_model." stands somewhere before the language model's own names.
        names = [name for held in self._names.values() for name in held]
        self._prefix = next((n[: n.index("language_model.") + 15] for n in names if "language_model." in n), "")

    def part(self, first: int, count: int, ends: bool) -> dict[str, Tensor]:
        """Weights of ``count`` layers in fp32, numbered from 0; with ``ends`` also embedding, last norm and head."""
        found = {}
        for path, names in self._names.items():
            with safe_open(str(path), "pt") as file:  # reopened each time, which frees what was read
                for name in names:
                    if not name.startswith(self._prefix):
                        continue
                    own = name[len(self._prefix) :]
                    layer = re.search(r"layers\.(\d+)\.", own)
                    if layer is None:
                        if ends or own.endswith("norm.weight"):
                            found[own] = file.get_tensor(name).float()
                    elif first <= int(layer[1]) < first + count:
                        found[_renumber(own, layer, -first)] = file.get_tensor(name).float()
        return found


def load_part(
    config: Any, weights: LanguageWeights, adapters: list[Path], first: int, count: int, ends: bool
) -> PreTrainedModel:
    """Some layers of a language model in fp32, with adapters merged.

    Args:
        config: configuration of the whole language model.
        adapters: folders of peft adapters for the whole language model, in order.
        ends: read embedding and head too; otherwise they are placeholders with eight tokens.

    Raises:
        ExportError: the checkpoint lacks a weight, or an adapter does not fit.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if not ends:
        config.vocab_size, config.pad_token_id = 8, None
        config.bos_token_id, config.eos_token_id = 1, 2  # the builder needs them
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing = model.load_state_dict(weights.part(first, count, ends), strict=False).missing_keys
    lost = [name for name in missing if "layers." in name or (ends and "lm_head" not in name)]
    if lost or (ends and "lm_head.weight" in missing and not config.tie_word_embeddings):
        raise ExportError(f"the checkpoint lacks {(lost or missing)[0]} of layers {first} to {first + count - 1}")
    for folder in adapters:
        model = _merge(model, folder, first, count)
    return model


def _merge(model: PreTrainedModel, folder: Path, first: int, count: int) -> PreTrainedModel:
    values = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and first <= int(layer[1]) < first + count:
            values[_renumber(name, layer, -first)] = value
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    unexpected = set_peft_model_state_dict(adapted, values).unexpected_keys
    if unexpected:
        raise ExportError(f"{folder} does not fit this checkpoint: it has {unexpected[0]}")
    return adapted.merge_and_unload()


def _renumber(name: str, layer: re.Match[str], by: int) -> str:
    return f"{name[: layer.start(1)]}{int(layer[1]) + by}{name[layer.end(1) :]}"


def language_adapters(folders: list[Path]) -> list[Path]:
    """The language model's newest adapter of each run, which contains those of earlier stages."""
    found = []
    for folder in folders:
        stages = [stage / "adapters" / "language" for stage in stage_folders(folder)]
        found += [stage for stage in stages if stage.is_dir()][-1:]
    return found
