"""Merge the adapters into the weights, and check that the logits stay the same."""

import torch
from torch import Tensor
from torch.nn import functional

from cbedge.prompt import ClinicalContext
from training.base import ModelAndTokenizers
from training.batches import encode_prompt
from training.stages import embed_inputs, encode_images, query_image
from training.trained import merge_adapters

MERGE_TOLERANCE = 1e-4


class MergeError(ValueError):
    """Merged and unmerged model differ by more than the tolerance."""


@torch.inference_mode()
def merge(parts: ModelAndTokenizers) -> float:
    """Merge all adapters into the model, in place; returns the largest difference of a logit, relative to the largest
    logit.

    A relative tolerance is needed: logits reach 40 after 14 to 40 layers, so fp32, merged or not, differs from fp64 by
    about 3e-4, while in fp64 merged and unmerged differ by 5e-6.

    Raises:
        MergeError: the relative difference is above :data:`MERGE_TOLERANCE`.
    """
    before = _probe_logits(parts)
    merge_adapters(parts)
    difference = float((_probe_logits(parts) - before).abs().max() / before.abs().max())
    if not difference <= MERGE_TOLERANCE:
        raise MergeError(
            f"merged logits differ from unmerged by {difference:.1e} of the largest, more than {MERGE_TOLERANCE:.0e}"
        )
    return difference


def _probe_logits(parts: ModelAndTokenizers) -> Tensor:
    """Logits of two fixed random images with a prompt, at the positions of the text, float32 [2, L, V]."""
    model = parts.model
    size = model.config.vision_config.image_size
    shades = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = functional.interpolate(shades, size=(size, size), mode="bicubic").repeat(1, 3, 1, 1)
    prompt = encode_prompt(parts, ClinicalContext(indication="cough and fever", view="frontal"))
    ids = torch.tensor([prompt, prompt])
    instruction = parts.qformer_tokenizer(["Describe the chest radiograph."] * 2, return_tensors="pt")
    _, projected = query_image(model, encode_images(model, pixels), instruction.input_ids, instruction.attention_mask)
    embeds, words = embed_inputs(model, ids, projected), ids[:, model.config.num_query_tokens :]
    if not model.config.use_decoder_only_language_model:  # its decoder gets the prompt
        return model.language_model(inputs_embeds=embeds, decoder_input_ids=words).logits.float()
    return model.language_model(inputs_embeds=embeds).logits.float()[:, -words.shape[1] :]
