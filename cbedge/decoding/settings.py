"""The decoding settings that users can choose."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np

from cbedge.arguments import check_type
from cbedge.errors import OptionError

MAX_BEAMS = 8


@dataclass(frozen=True)
class Decoding:
    """Decoding settings; the default is greedy decoding.

    Attributes:
        temperature: 0 selects the most probable token; above 0, tokens are sampled, more evenly for higher values.
        top_p: sample from the most probable tokens with this total probability (Holtzman et al. 2020).
        seed: random seed for sampling.
        beams: number of beams; above 1, beam search by mean log-probability.
        repetition_penalty: positive logits of earlier tokens are divided by it, negative ones multiplied (Keskar et al.
            2019); 1 has no effect. In a report it applies at word starts only, so that no word is broken.
        no_repeat: never start a word that would repeat an n-gram of this many tokens; 0 allows repeats.
        stop_bias: added to the logits of stop tokens: below 0, drafts become longer; above 0, shorter.
        never: banned tokens, in addition to the bundle's ``never_ids``.
        keep_to_template: follow the given template, or the bundle's, if any (:mod:`cbedge.drafting.templates`).
        speculative: use speculative decoding with the template and the bundle's phrasebook where it is faster. It
            changes no token, and is used with greedy decoding only.

    Raises:
        OptionError: a value is out of range, or two values cannot be combined.
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
            check_type(name, getattr(self, name), numbers.Real, "a number")
        for name in ("seed", "beams", "no_repeat"):
            check_type(name, getattr(self, name), numbers.Integral, "a whole number")
        for name in ("speculative", "keep_to_template"):
            check_type(name, getattr(self, name), (bool, np.bool_), "True or False")
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
                raise OptionError(f"{name} is {getattr(self, name)}; give {wanted}")
        if self.beams > 1 and self.temperature > 0:
            raise OptionError("beams and temperature cannot be combined: give one of them")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable allowed token is always selected."""
        return self.temperature == 0 and self.beams == 1
