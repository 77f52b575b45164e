"""Write an InstructBLIP checkpoint of random weights: latency depends only on shapes.

``vicuna-7b`` is as wide as Salesforce/instructblip-vicuna-7b (ViT-g/14, Q-Former, Vicuna-7B), with a given number of
layers; ``tiny`` runs the same steps on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from training.base import ModelAndTokenizers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
# Vocabulary, width, width of the feed-forward layers, attention heads, layers.
_LANGUAGE = {"vicuna-7b": (32_001, 4096, 11_008, 32, 32), "tiny": (300, 64, 128, 4, 2)}
_SPECIAL = ("<unk>", "<s>", "</s>", "<image>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the language model with single bytes."""
    table = {t: i for i, t in enumerate([*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    rules = Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>"))
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the Q-Former with single letters."""
    letters = [chr(i) for i in range(33, 127)]
    table = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)])}
    rules = Tokenizer(models.WordPiece(vocab=table, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def configuration(shape: str, layers: int | None) -> InstructBlipConfig:
    """The configuration of a shape, with ``layers`` layers of the language model, or all."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    if shape == "vicuna-7b":
        vision, qformer = InstructBlipVisionConfig(), InstructBlipQFormerConfig()
    else:
        vision = InstructBlipVisionConfig(**small, patch_size=56)
        qformer = InstructBlipQFormerConfig(**small)
    vision.initializer_range = 0.02  # with the default, 1e-10, all images look the same
    qformer.encoder_hidden_size = vision.hidden_size
    vocabulary, width, wide, heads, all_layers = _LANGUAGE[shape]
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32, image_token_index=3
    )


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    shape: Annotated[str, typer.Option(help="vicuna-7b or tiny.")] = "vicuna-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the language model.", show_default="all")] = None,
) -> None:
    """Write one checkpoint in bf16."""
    if shape not in _LANGUAGE or out.exists():
        reason = f"{out} exists already" if out.exists() else f"unknown shape {shape!r}; give {' or '.join(_LANGUAGE)}"
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes minutes
        model = InstructBlipForConditionalGeneration(configuration(shape, layers))
    torch.set_default_dtype(torch.float32)
    model.query_tokens.data.normal_(std=0.02)
    ModelAndTokenizers(model, byte_tokenizer(), letter_tokenizer(), 3).save(out)
    typer.echo(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion random weights")


if __name__ == "__main__":
    app()
