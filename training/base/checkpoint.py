"""Load an InstructBLIP checkpoint, such as a released one."""

import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from training.base.parts import ModelAndTokenizers, load_finding_head
from training.processor import load_preprocessing

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that are only on a hub
_IMAGE_TOKEN = "<image>"  # InstructBlipProcessor's


def load_checkpoint(base: str, precision: str = "fp32", image_side: bool = False) -> ModelAndTokenizers:
    """Load a checkpoint.

    Args:
        precision: of the weights in memory: ``fp32``; ``bf16``; or ``nf4``, the language model's linear layers in 4-bit
            NormalFloat with double quantization (QLoRA, Dettmers et al. 2023; by bitsandbytes) and the rest in bf16.
        image_side: load one layer of the language model, because a large one may not fit into memory.

    Raises:
        OSError: the folder or hub name holds no InstructBLIP checkpoint.
        ValueError: its preprocessing is not supported, or gives another image size than the vision encoder reads.
        ImportError: ``nf4`` without bitsandbytes.
    """
    options = _precision_options(precision)
    if image_side:
        options["config"] = _with_one_layer(base)
    model = InstructBlipForConditionalGeneration.from_pretrained(base, **options)
    model.language_model.is_loaded_in_4bit = precision == "nf4"  # peft reads it from the part that it adapts
    for module in model.modules() if precision == "nf4" else ():
        # On such CPUs bitsandbytes repacks weights in evaluation mode, and no gradient flows through them after that.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(base)
    if Path(base).is_dir():
        qformer_tokenizer = AutoTokenizer.from_pretrained(Path(base) / "qformer_tokenizer")
    else:
        qformer_tokenizer = AutoTokenizer.from_pretrained(base, subfolder="qformer_tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = load_finding_head(Path(base))
    image_token_id = _image_token_id(model, tokenizer)
    settings = load_preprocessing(base, model.config.vision_config.image_size)
    return ModelAndTokenizers(model, tokenizer, qformer_tokenizer, image_token_id, head, settings)


@torch.no_grad()
def _image_token_id(model: InstructBlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> int:
    """The placeholder of image embeddings. Early releases have none and get ``<image>``, as their processor adds it.
    Its embedding is the mean of all others, so that it is never the most probable token."""
    config = model.config
    if config.image_token_id is None:
        tokenizer.add_tokens([AddedToken(_IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        config.image_token_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        rows = model.get_input_embeddings().num_embeddings
        if config.image_token_id >= rows:
            model.resize_token_embeddings(config.image_token_id + 1, mean_resizing=False)
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[rows:] = table.weight[:rows].mean(0)
    return config.image_token_id


def _with_one_layer(base: str) -> InstructBlipConfig:
    config = InstructBlipConfig.from_pretrained(base)
    config.text_config.num_hidden_layers = 1
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:1]
    return config


def _precision_options(precision: str) -> dict[str, Any]:
    if precision != "nf4":
        return {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    from transformers import BitsAndBytesConfig

    apart = ["vision_model", "qformer", "language_projection", "lm_head", "shared", "embed_tokens"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=apart,
    )
    return {"dtype": torch.bfloat16, "quantization_config": settings}
