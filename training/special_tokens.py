"""Special tokens around the prompt and the report, as transformers' ``InstructBlipProcessor`` places them.

The language model reads image placeholders, the tokenizer's prefix (a beginning-of-text token), the prompt, and the
tokenizer's suffix (``</s>`` for Flan-T5's encoder).
"""

from training.base import ModelAndTokenizers


def prefix_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids between image embeddings and prompt: the tokenizer's prefix."""
    return _around(parts)[0]


def suffix_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids after the prompt: the tokenizer's suffix."""
    return _around(parts)[1]


def stop_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids that end a report: the tokenizer's, and those of the model's configuration."""
    configured = parts.model.config.text_config.eos_token_id
    others = configured if isinstance(configured, list | tuple) else [configured]
    ids = [parts.tokenizer.eos_token_id, *others]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def start_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Start token ids of the decoder of an encoder-decoder; empty for a decoder-only model."""
    if parts.model.config.use_decoder_only_language_model:
        return ()
    return (parts.model.language_model.config.decoder_start_token_id,)


def _around(parts: ModelAndTokenizers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    text = "Report"
    plain = parts.tokenizer(text, add_special_tokens=False).input_ids
    whole = parts.tokenizer(text).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise ValueError("the tokenizer changes the tokens of a text when it adds special tokens, so it cannot be used")
