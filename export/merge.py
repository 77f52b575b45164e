"""Put the adapters into the weights, and prove that the merged model says the same."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from training.base import ModelAndTokenizers, load_model
from training.batches import encode_prompt
from training.stages import embed_inputs, encode_images, load_trained, query_image
from training.train import stage_folders

MERGE_TOLERANCE = 1e-4


class MergeError(ValueError):
    """Merged and unmerged model differ by more than the tolerance."""


def load_adapted(checkpoint: str, adapters: list[Path], cache: Path) -> ModelAndTokenizers:
    """Load a checkpoint and what training put on it, adapters not yet merged.

    Args:
        checkpoint: an InstructBLIP folder or hub name, or ``mini``.
        adapters: folders of finished stages, in order; or the folder of a run, which stands for all of its stages.
        cache: where base weights are kept.

    Raises:
        FileNotFoundError: a folder holds no finished stage.
        ValueError: what it holds does not fit the checkpoint.
    """
    parts = load_model(checkpoint, cache)
    for folder in adapters:
        for stage in stage_folders(folder):
            load_trained(parts.model, stage)
    parts.model.eval()
    return parts


@torch.inference_mode()
def merge(parts: ModelAndTokenizers) -> float:
    """Merge every adapter into the model, in place; returns the largest difference of any logit, in fp32.

    Raises:
        MergeError: the difference is above :data:`MERGE_TOLERANCE`.
    """
    before = _probe_logits(parts)
    for name in ("vision_model", "language_model"):
        part = getattr(parts.model, name)
        if isinstance(part, PeftModel):
            setattr(parts.model, name, part.merge_and_unload())
    difference = float((_probe_logits(parts) - before).abs().max())
    if not difference <= MERGE_TOLERANCE:
        raise MergeError(f"merged logits differ from unmerged by {difference:.2e}, more than {MERGE_TOLERANCE:.0e}")
    return difference


def _probe_logits(parts: ModelAndTokenizers) -> Tensor:
    """Logits of two fixed random images with a prompt each, float32 [2, L, V]."""
    from cbedge.prompt import ClinicalContext

    model = parts.model
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    prompt = encode_prompt(parts, ClinicalContext(indication="cough and fever", view="frontal"))
    ids = torch.tensor([prompt, prompt])
    instruction = parts.qformer_tokenizer(["Describe the chest radiograph."] * 2, return_tensors="pt")
    _, projected = query_image(model, encode_images(model, pixels), instruction.input_ids, instruction.attention_mask)
    return model.language_model(inputs_embeds=embed_inputs(model, ids, projected)).logits.float()
