"""The two tokenizers of a bundle: the language model's and the Q-Former's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cbedge.bundles.bundle import QFORMER_TOKENIZER, TOKENIZER, Bundle
from cbedge.errors import BundleError

MAX_INSTRUCTION_TOKENS = 256  # of the Q-Former, as in training; longer instructions are truncated for it only


class TextCodec:
    """Converts text to token ids and back.

    Args:
        bundle: an opened bundle.

    Raises:
        BundleError: a tokenizer cannot be read.
    """

    def __init__(self, bundle: Bundle):
        self._manifest = bundle.manifest
        self._tokenizer = load_tokenizer(bundle, TOKENIZER)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._qformer_tokenizer = load_tokenizer(bundle, QFORMER_TOKENIZER)
        self._qformer_tokenizer.no_padding()
        self._qformer_tokenizer.enable_truncation(MAX_INSTRUCTION_TOKENS)
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text for the language model, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt with special tokens, as the processor in transformers gives them."""
        return [*self._manifest.prefix_ids, *self.encode(prompt), *self._manifest.suffix_ids]

    def encode_instruction(self, instruction: str) -> list[int]:
        """Token ids of an instruction for the Q-Former, with special tokens."""
        return self._qformer_tokenizer.encode(instruction, add_special_tokens=True).ids

    def encode_sentences(self, sentences: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each sentence when it follows another one."""
        return tuple(tuple(self.encode(f" {text}")) for text in sentences)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def new_stream(self) -> TokenStream:
        """A new incremental detokenizer."""
        return TokenStream(self._tokenizer)

    def token_text(self, token_id: int) -> str:
        """The text that a token adds inside a report, with the space before a word."""
        if token_id not in self._token_texts:
            anchor = self.encode("a")
            before, both = self.decode(anchor), self.decode([*anchor, token_id])
            self._token_texts[token_id] = both[len(before) :] if both.startswith(before) else ""
        return self._token_texts[token_id]

    @cached_property
    def headings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of ``FINDINGS:``, and of ``IMPRESSION:`` after a sentence."""
        return tuple(self.encode("FINDINGS:")), tuple(self.encode(" IMPRESSION:"))

    @cached_property
    def full_stop(self) -> int:
        """Token id of a full stop after a word."""
        return self.encode("a.")[-1]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Token ids of the language model's special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)


class TokenStream:
    """Incremental detokenizer that returns whole characters only.

    Args:
        tokenizer: the language model's.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """Add a token; the text that it completes, or an empty string."""
        return self._stream.step(self._tokenizer, token_id) or ""


def load_tokenizer(bundle: Bundle, name: str) -> Tokenizer:
    """Load a tokenizer of a bundle.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        return Tokenizer.from_file(str(bundle.folder / name))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{name} in {bundle.folder} cannot be read: install or export the bundle again") from error
