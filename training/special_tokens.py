"""Special tokens around the prompt and the report, as transformers' ``InstructBlipProcessor`` places them.

The language model reads: image placeholders, what the tokenizer puts before a text (a beginning-of-text token), the
prompt, what the tokenizer puts after a text (``</s>`` for Flan-T5's encoder).
"""

from training.base import ModelAndTokenizers


def prefix_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids that the tokenizer puts before a text, between image embeddings and prompt."""
    return _around(parts)[0]


def suffix_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids that the tokenizer puts after a text."""
    return _around(parts)[1]


def stop_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids that end a report: the one that training puts there, and those that end transformers' ``generate``."""
    configured = parts.model.config.text_config.eos_token_id
    others = configured if isinstance(configured, list | tuple) else [configured]
    ids = [parts.tokenizer.eos_token_id, *others]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def start_ids(parts: ModelAndTokenizers) -> tuple[int, ...]:
    """Token ids that the decoder of an encoder-decoder begins with; none where there is no encoder."""
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
    raise ValueError("the tokenizer changes a text's own tokens when it adds special ones: it cannot be used")
