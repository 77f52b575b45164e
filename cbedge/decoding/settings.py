"""The decoding settings that users can choose."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np

from cbedge.errors import ContextError

MAX_BEAMS = 8


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the default is greedy.

    Attributes:
        temperature: 0 takes the likeliest token; above it tokens are drawn, the more evenly the higher.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: random seed for sampling.
        beams: above 1, beam search with so many hypotheses, compared by mean log-probability.
        repetition_penalty: logits of tokens already written are divided by it, or multiplied where negative
            (Keskar et al. 2019); 1 is none. In a report it acts where words begin, so that no word is broken.
        no_repeat: never begin a word that would repeat a run of so many tokens; 0 allows it.
        stop_bias: added to the logits of the tokens that end a report: below 0, drafts become longer, above it shorter.
        never: tokens that are never written; a bundle's own (its ``never_ids``) are added to them.
        keep_to_template: write the sentences of the template that is given, or that the bundle has
            (:mod:`cbedge.drafting.templates`); where there is none it does nothing.
        speculative: let the template and the bundle's phrasebook guess ahead where that is faster. It changes no token,
            and is used where the likeliest token is taken.

    Raises:
        ContextError: a value is out of its range, or two cannot be combined.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat: int = 0
    stop_bias: float = 0.0
    never: tuple[int, ...] = ()
    speculative: bool = True
    keep_to_template: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty", "stop_bias"):
            self._check_type(name, numbers.Real, "a number")
        for name in ("seed", "beams", "no_repeat"):
            self._check_type(name, numbers.Integral, "a whole number")
        for name in ("speculative", "keep_to_template"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ContextError(f"{name} must be True or False, not {type(getattr(self, name)).__name__}")
        ranges = (
            ("temperature", 0 <= self.temperature <= 5, "0 to 5"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("beams", 1 <= self.beams <= MAX_BEAMS, f"1 to {MAX_BEAMS}"),
            ("repetition_penalty", 1 <= self.repetition_penalty <= 10, "1 to 10"),
            ("no_repeat", self.no_repeat >= 0, "0 or more"),
            ("stop_bias", -20 <= self.stop_bias <= 20, "-20 to 20"),
        )
        for name, fits, wanted in ranges:
            if not fits:
                raise ContextError(f"{name} is {getattr(self, name)}; give {wanted}")
        if self.beams > 1 and self.temperature > 0:
            raise ContextError("beams and temperature cannot be combined: give one of them")

    def _check_type(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
            raise ContextError(f"{name} must be {wanted}, not {type(value).__name__}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, of those that the controls leave."""
        return self.temperature == 0 and self.beams == 1
