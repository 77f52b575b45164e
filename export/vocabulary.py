"""Restrict a language model to the vocabulary of its domain: embedding and head shrink, and the text stays the same.

A small model has many weights for words that occur in no report: of the 135 million weights of SmolLM2-135M, 28 million
are its table of 49,152 tokens, and the head reads all of them for every token. Kept are the tokens of the given texts,
the most frequent tokens of the language, and all that byte-pair encoding needs to build them. Single bytes stay, so any
text can still be encoded. A text whose tokens are all kept is encoded into the same tokens, because a removed merge
makes a removed token.

The Q-Former reads a fixed instruction and, in training, reports. Its WordPieces of those texts are kept, and all single
ASCII characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbedge.findings.image_findings import OTHER
from cbedge.prompt import ClinicalContext, build_prompt, build_query_instruction
from export.tracing import ExportError
from training.base import ModelAndTokenizers
from training.datasets.iu_xray import read_studies
from training.ontology import TAGS

COMMON = 12_000
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def restrict_vocabulary(parts: ModelAndTokenizers, texts: Iterable[str], common: int = COMMON) -> tuple[int, int]:
    """Remove every token from a merged model, in place, that neither the texts nor the first merges need.

    Args:
        parts: a merged model whose tokenizer is byte-pair encoding.
        texts: reports and instructions of the training split.
        common: number of the first, most frequent merges that are also kept.

    Returns:
        The numbers of the language model's tokens before and after.

    Raises:
        ExportError: the tokenizer is of another kind.
    """
    texts = [*texts]
    rules = json.loads(parts.tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE":
        raise ExportError(f"a {rules['model']['type']} tokenizer cannot be restricted, only byte-pair encoding can")
    before = len(parts.tokenizer)
    used = {i for ids in parts.tokenizer(texts, add_special_tokens=True).input_ids for i in ids}
    kept = _kept_tokens(rules, used, common)
    renumber = {old: new for new, old in enumerate(kept)}
    kept_tokens = rules["model"]["vocab"] = _left(rules["model"]["vocab"], renumber)
    rules["model"]["merges"] = [
        m for m in rules["model"]["merges"] if all(t in kept_tokens for t in (*_pair(m), "".join(_pair(m))))
    ]
    parts.tokenizer = _renumbered(parts.tokenizer, rules, renumber)
    _restrict_weights(parts.model, kept)
    _renumber_config(parts, renumber)
    _restrict_query_words(parts, texts)
    return before, len(kept)


def domain_texts(data: Path) -> list[str]:
    """The texts of the domain: train reports, and prompts with all findings."""
    studies = read_studies(data, ("train",))
    prompts = [build_prompt(ClinicalContext(view=view), (*TAGS, OTHER)) for view in ("frontal", "lateral")]
    return [*prompts, *(text for s in studies for text in (s.target, build_prompt(s.context, ())))]


def _kept_tokens(rules: dict[str, Any], used: set[int], common: int) -> list[int]:
    """Old ids to keep, ascending."""
    vocabulary: dict[str, int] = rules["model"]["vocab"]
    merges = [_pair(merge) for merge in rules["model"]["merges"]]
    made = {a + b: (a, b) for a, b in reversed(merges)}
    names = {i: token for token, i in vocabulary.items()}
    wanted = {token for token in vocabulary if token not in made}  # bytes, characters, and tokens without a merge
    wanted |= {names[i] for i in used if i in names} | {a + b for a, b in merges[:common]}
    waiting = list(wanted)
    while waiting:
        for part in made.get(waiting.pop(), ()):
            if part not in wanted:
                wanted.add(part)
                waiting.append(part)
    return sorted({vocabulary[token] for token in wanted} | {entry["id"] for entry in rules["added_tokens"]})


def _left(vocabulary: dict[str, int], renumber: dict[int, int]) -> dict[str, int]:
    return {token: renumber[i] for token, i in vocabulary.items() if i in renumber}


@torch.no_grad()
def _restrict_query_words(parts: ModelAndTokenizers, texts: list[str]) -> None:
    """Remove the WordPieces from the Q-Former, in place, that the texts do not need."""
    rules = json.loads(parts.qformer_tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "WordPiece":
        raise ExportError(f"the Q-Former's tokenizer is {rules['model']['type']}; only WordPiece is restricted")
    prefix = rules["model"]["continuing_subword_prefix"]
    instructions = [build_query_instruction(ClinicalContext(view=view)) for view in (None, "frontal", "lateral")]
    encoded = parts.qformer_tokenizer([*texts, *instructions], truncation=False, padding=False).input_ids
    used = {i for ids in encoded for i in ids} | {entry["id"] for entry in rules["added_tokens"]}
    for token, i in rules["model"]["vocab"].items():
        if len(token.removeprefix(prefix)) == 1 and token.isascii():
            used.add(i)
    kept = sorted(used)
    renumber = {old: new for new, old in enumerate(kept)}
    rules["model"]["vocab"] = _left(rules["model"]["vocab"], renumber)
    parts.qformer_tokenizer = _renumbered(parts.qformer_tokenizer, rules, renumber)
    table = parts.model.qformer.embeddings.word_embeddings
    table.weight = nn.Parameter(table.weight[torch.tensor(kept)].clone(), requires_grad=False)
    table.num_embeddings = len(kept)
    table.padding_idx = None if table.padding_idx is None else renumber.get(table.padding_idx)
    config = parts.model.config.qformer_config
    config.vocab_size = parts.model.qformer.config.vocab_size = len(kept)
    config.pad_token_id = parts.model.qformer.config.pad_token_id = renumber.get(config.pad_token_id)


def _renumbered(
    tokenizer: PreTrainedTokenizerBase, rules: dict[str, Any], renumber: dict[int, int]
) -> PreTrainedTokenizerBase:
    for entry in rules["added_tokens"]:
        entry["id"] = renumber[entry["id"]]
    for special in (rules["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [renumber[i] for i in special["ids"]]
    named = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name, None) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **named)


@torch.no_grad()
def _restrict_weights(model: InstructBlipForConditionalGeneration, kept: list[int]) -> None:
    language = model.language_model
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    rows = torch.tensor(kept)
    embedding.weight = nn.Parameter(embedding.weight[rows].clone(), requires_grad=False)
    embedding.num_embeddings = len(kept)
    if head is None:
        return
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[rows].clone(), requires_grad=False)
    head.out_features = len(kept)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[rows].clone(), requires_grad=False)


def _renumber_config(parts: ModelAndTokenizers, renumber: dict[int, int]) -> None:
    config = parts.model.config
    parts.image_token_id = renumber[parts.image_token_id]
    config.image_token_id = parts.image_token_id
    language = parts.model.language_model
    configs = [config.text_config, language.config]
    for place in configs:
        place.vocab_size = len(renumber)
    for place in (*configs, *(getattr(holder, "generation_config", None) for holder in (parts.model, language))):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old = getattr(place, name, None)
            if isinstance(old, int):
                setattr(place, name, renumber.get(old))


def _pair(merge: Any) -> tuple[str, str]:
    """The two parts of a merge, which older files store as ``"a b"``."""
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b
