"""Tiny InstructBLIP checkpoints of random weights, file by file as ``Salesforce/instructblip-*`` were released.

``vicuna`` has a LlamaForCausalLM and a Llama tokenizer whose beginning-of-text token is ``</s>``; ``flan-t5`` a
T5ForConditionalGeneration and a T5 tokenizer that ends each text with ``</s>``. Three layouts of the same checkpoint:

- ``released``: ``preprocessor_config.json``, ``processor_config.json``, ``qformer_tokenizer/``, and ``<image>`` as a
  token;
- ``early``: as first released, without ``<image>``, ``image_token_index`` and ``processor_config.json``;
- ``transformers-5``: as ``InstructBlipProcessor.save_pretrained`` writes it now, the image processor inside
  ``processor_config.json``.
"""

import json
from pathlib import Path

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
_SPREAD = 0.15  # of random weights: outputs must differ between images, or equality would show nothing


def write_released(
    folder: Path, family: str, layout: str = "released", image_size: int = 224, patch_size: int = 14, seed: int = 0
) -> Path:
    """Write one checkpoint into a new folder, and return the folder.

    Args:
        folder: must not exist.
        family: one of :data:`FAMILIES`.
        layout: one of :data:`LAYOUTS`.
        image_size, patch_size: of the vision encoder; the position table follows them.
        seed: of the weights.
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
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "BlipImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "InstructBlipProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": image_size, "width": image_size},
        },
    )
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
    if family == "vicuna":
        text: LlamaConfig | T5Config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            initializer_range=_SPREAD,
        )
    else:
        text = T5Config(
            architectures=["T5ForConditionalGeneration"],
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            initializer_range=_SPREAD,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=words,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            encoder_hidden_size=32,
            initializer_range=_SPREAD,
        ),
        text_config=text,
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=image_token,
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.query_tokens.normal_()
        model.language_projection.weight.normal_(std=_SPREAD)
        for parameter in model.parameters():
            if not parameter.any():  # biases: equal ones would be stored once in a graph, and a wrong one not be seen
                parameter.normal_(std=_SPREAD / 3)
        # Small enough that what is read decides on the next token, and not the last token alone.
        model.get_input_embeddings().weight.normal_(std=_SPREAD)
        model.get_output_embeddings().weight.normal_()
        if family == "flan-t5":
            for name, parameter in model.language_model.named_parameters():
                if name.endswith((".v.weight", ".o.weight", ".wo.weight", ".wi_1.weight")):
                    parameter.mul_(4)
    return model


def _llama_tokenizer(folder: Path, with_image: bool) -> tuple[int, int | None]:
    """Llama's files; returns the vocabulary's size and the image token's id."""
    rules = Tokenizer(models.BPE())
    rules.normalizer = normalizers.Replace(" ", "▁")
    rules.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    rules.train_from_iterator([f"▁{text}" for text in _CORPUS], trainer)
    trained = json.loads(rules.to_str())["model"]
    table = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    table |= {t: i for i, t in enumerate((t for t in trained["vocab"] if t not in table), start=len(table))}
    specials = ["<unk>", "<s>", "</s>", "[PAD]", *(["<image>"] if with_image else [])]
    ids = {token: table.get(token, len(table) + i - 3) for i, token in enumerate(specials)}
    bos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    _write(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(ids),
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": table,
                "merges": trained["merges"],
            },
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": _decoder(ids),
            "bos_token": "</s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "legacy": True,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "[PAD]",
            "processor_class": "InstructBlipProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "truncation_side": "left",
            "unk_token": "</s>",
        },
    )
    _write(
        folder / "special_tokens_map.json",
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "</s>"},
    )
    return len(table) + len(specials) - 3, ids.get("<image>")


def _t5_tokenizer(folder: Path, with_image: bool) -> tuple[int, int | None]:
    """Flan-T5's files; returns the vocabulary's size and the image token's id."""
    rules = Tokenizer(models.Unigram())
    rules.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    rules.train_from_iterator(_CORPUS, trainer)
    pieces = json.loads(rules.to_str())["model"]["vocab"]
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    pieces += [[token, 0.0] for token in extra]
    ids = {token: i for i, (token, _) in enumerate(pieces) if token in ("<pad>", "</s>", "<unk>", *extra)}
    if with_image:
        ids["<image>"] = len(pieces)
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    _write(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(ids),
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [one, eos],
                "pair": [one, eos, two, eos],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": _decoder(ids),
            "additional_special_tokens": sorted(extra),
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": True,
            "extra_ids": 100,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "processor_class": "InstructBlipProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            "truncation_side": "left",
            "unk_token": "<unk>",
        },
    )
    _write(folder / "special_tokens_map.json", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return len(pieces) + with_image, ids.get("<image>")


def _qformer_tokenizer(folder: Path) -> int:
    """The Q-Former's files, BERT's with ``[DEC]`` as in the releases; returns the vocabulary's size."""
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


def _decoder(ids: dict[str, int]) -> dict[str, dict]:
    return {str(i): {"content": token} | _FLAGS for token, i in sorted(ids.items(), key=lambda pair: pair[1])}


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
