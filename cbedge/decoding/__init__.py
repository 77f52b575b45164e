"""Turn a language model's logits into tokens: settings, logits processors, samplers, one decoding loop, beam search.

Nothing here knows radiology: a draft's policy comes in as logits processors and as a :class:`Constraint`.
"""

from cbedge.decoding.protocol import Constraint, Decoder, GuessSource, LogitsProcessor, Sampler, Token
from cbedge.decoding.search import beam_search, decode
from cbedge.decoding.settings import Decoding
from cbedge.decoding.speculative import GuessLength, SpeculationStats

__all__ = [
    "Constraint",
    "Decoder",
    "Decoding",
    "GuessLength",
    "GuessSource",
    "LogitsProcessor",
    "Sampler",
    "SpeculationStats",
    "Token",
    "beam_search",
    "decode",
]
