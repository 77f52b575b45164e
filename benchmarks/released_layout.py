"""Write tiny InstructBLIP checkpoints of random weights with the files of the released ``Salesforce/instructblip-*``.

``vicuna`` has a LlamaForCausalLM and a Llama tokenizer whose beginning-of-text token is ``</s>``; ``flan-t5`` has a
T5ForConditionalGeneration and a T5 tokenizer that ends each text with ``</s>``. There are three layouts:

- ``released``: ``preprocessor_config.json``, ``processor_config.json``, ``qformer_tokenizer/``, and ``<image>`` as a
  token;
- ``early``: as first released, without ``<image>``, ``image_token_index`` and ``processor_config.json``;
- ``transformers-5``: as ``InstructBlipProcessor.save_pretrained`` writes it now, with the image processor in
  ``processor_config.json``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    T5Config,
)

FAMILIES = ("vicuna", "flan-t5")
LAYOUTS = ("released", "early", "transformers-5")
NUM_QUERY_TOKENS = 32
_CORPUS = (
    "Describe the chest radiograph. View: frontal. Indication: cough and fever, chest pain. Comparison: None.",
    "FINDINGS: The heart is normal in size. The lungs are clear. IMPRESSION: No acute disease. Seen: none. Report:",
    "FINDINGS: There is a small left pleural effusion. IMPRESSION: Cardiomegaly and effusion. Is there a fracture?",
)
_FILES = Path(__file__).with_name("released_files")
_STANDARD_DEVIATION = 0.15  # of random weights: outputs must differ between images
_TEXT = {
    "vicuna": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": _STANDARD_DEVIATION,
    },
    "flan-t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}


def write_released(
    folder: Path, family: str, layout: str = "released", image_size: int = 224, patch_size: int = 14, seed: int = 0
) -> Path:
    """Write one checkpoint into a new folder, and return the folder.

    Args:
        family: one of :data:`FAMILIES`.
        layout: one of :data:`LAYOUTS`.
    """
    qformer_folder = folder / "qformer_tokenizer"
    qformer_folder.mkdir(parents=True)
    with_image = layout != "early"
    size, image_token = (_llama_tokenizer if family == "vicuna" else _t5_tokenizer)(folder, with_image)
    words = _qformer_tokenizer(qformer_folder)
    model = _model(family, size, words, image_token, image_size, patch_size, seed)
    model.save_pretrained(folder)
    if not with_image:  # early configurations have no such key at all
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("image_token_index", None)
        _write(folder / "config.json", config)
    square = {"height": image_size, "width": image_size}
    _write(folder / "preprocessor_config.json", _released("preprocessor_config") | {"size": square})
    if with_image:
        processor = {"num_query_tokens": NUM_QUERY_TOKENS, "processor_class": "InstructBlipProcessor"}
        _write(folder / "processor_config.json", processor)
    if layout == "transformers-5":
        processor = InstructBlipProcessor.from_pretrained(folder)
        (folder / "preprocessor_config.json").unlink()
        processor.save_pretrained(folder)
    return folder


def _model(
    family: str, vocabulary: int, words: int, image_token: int | None, image_size: int, patch_size: int, seed: int
) -> InstructBlipForConditionalGeneration:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "initializer_range": _STANDARD_DEVIATION}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(image_size=image_size, patch_size=patch_size, **small),
        qformer_config=InstructBlipQFormerConfig(vocab_size=words, encoder_hidden_size=32, **small),
        text_config=(LlamaConfig if family == "vicuna" else T5Config)(vocab_size=vocabulary, **_TEXT[family]),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=image_token,
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    _randomize(model, family)
    return model


@torch.no_grad()
def _randomize(model: InstructBlipForConditionalGeneration, family: str) -> None:
    """Draw weights with which outputs depend on the image and on the whole prompt."""
    model.query_tokens.normal_()
    model.language_projection.weight.normal_(std=_STANDARD_DEVIATION)
    for parameter in model.parameters():
        if not parameter.any():  # graphs store equal biases once, which would hide a wrong one
            parameter.normal_(std=_STANDARD_DEVIATION / 3)
    # Small, so that the whole input decides on the next token, and not only the last token.
    model.get_input_embeddings().weight.normal_(std=_STANDARD_DEVIATION)
    model.get_output_embeddings().weight.normal_()
    if family == "flan-t5":
        for name, parameter in model.language_model.named_parameters():
            if name.endswith((".v.weight", ".o.weight", ".wo.weight", ".wi_1.weight")):
                parameter.mul_(4)


def _llama_tokenizer(folder: Path, with_image: bool) -> tuple[int, int | None]:
    """Write Llama's files; returns the size of the vocabulary and the id of the image token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([f"▁{text}" for text in _CORPUS], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    table = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    table |= {t: i for i, t in enumerate((t for t in trained["vocab"] if t not in table), start=len(table))}
    specials = ["<unk>", "<s>", "</s>", "[PAD]", *(["<image>"] if with_image else [])]
    ids = {token: table.get(token, len(table) + i - 3) for i, token in enumerate(specials)}
    rules = _released("llama_tokenizer") | {"added_tokens": _added(ids)}
    rules["model"] |= {"vocab": table, "merges": trained["merges"]}
    _write_tokenizer(folder, "llama", rules, ids)
    return len(table) + len(specials) - 3, ids.get("<image>")


def _t5_tokenizer(folder: Path, with_image: bool) -> tuple[int, int | None]:
    """Write Flan-T5's files; returns the size of the vocabulary and the id of the image token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    pieces += [[token, 0.0] for token in extra]
    ids = {token: i for i, (token, _) in enumerate(pieces) if token in ("<pad>", "</s>", "<unk>", *extra)}
    if with_image:
        ids["<image>"] = len(pieces)
    rules = _released("t5_tokenizer") | {"added_tokens": _added(ids)}
    rules["model"]["vocab"] = pieces
    _write_tokenizer(folder, "t5", rules, ids, {"additional_special_tokens": sorted(extra)})
    return len(pieces) + with_image, ids.get("<image>")


def _qformer_tokenizer(folder: Path) -> int:
    """Write the Q-Former's files, BERT's with ``[DEC]`` as released; returns the size of the vocabulary."""
    words = sorted({word.strip(".,:?").lower() for text in _CORPUS for word in text.split()})
    letters = sorted({letter for word in words for letter in word} | set(".,:?"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [word for word in words if len(word) > 1]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder, truncation_side="left")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _added(ids: dict[str, int]) -> list[dict]:
    return [{"id": i, "content": token} | _FLAGS for token, i in sorted(ids.items(), key=lambda pair: pair[1])]


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _released(name: str) -> dict:
    """One of the released files, without what depends on the vocabulary or on the image size."""
    return json.loads((_FILES / f"{name}.json").read_text(encoding="utf-8"))


def _write_tokenizer(folder: Path, kind: str, rules: dict, ids: dict[str, int], more: dict | None = None) -> None:
    decoder = {str(entry.pop("id")): entry for entry in _added(ids)}
    settings = _released(f"{kind}_tokenizer_config") | {"added_tokens_decoder": decoder} | (more or {})
    _write(folder / "tokenizer.json", rules)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", _released(f"{kind}_special_tokens_map"))


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
