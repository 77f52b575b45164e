"""Samplers: how a token is chosen from processed logits."""

from __future__ import annotations

import numpy as np

from cbedge.decoding.protocol import Sampler
from cbedge.decoding.settings import Decoding

# Least probability of a drawn token, as a share of the likeliest one's (min-p sampling, Nguyen et al. 2024).
MIN_P = 0.02


class Greedy:
    """Takes the likeliest token."""

    is_greedy = True

    def __call__(self, logits: np.ndarray) -> int:
        """See :class:`~cbedge.decoding.Sampler`."""
        return int(logits.argmax())


class NucleusSampler:
    """Draws from the likeliest tokens that together have a probability (Holtzman et al. 2020), with :data:`MIN_P`.

    Args:
        temperature: above 0.
        top_p: that probability, above 0, at most 1.
        seed: random seed.
    """

    is_greedy = False

    def __init__(self, temperature: float, top_p: float, seed: int):
        self.temperature, self.top_p = temperature, top_p
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """See :class:`~cbedge.decoding.Sampler`."""
        within = np.flatnonzero(logits >= logits.max() + np.log(MIN_P))
        order = within[np.argsort(-logits[within], kind="stable")]
        probabilities = np.exp(log_softmax(logits[order].astype(np.float64) / self.temperature))
        kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
        probabilities = probabilities[:kept] / probabilities[:kept].sum()
        return int(order[self._rng.choice(len(probabilities), p=probabilities)])


def sampler_of(settings: Decoding) -> Sampler:
    """The sampler that settings ask for."""
    if settings.temperature == 0:
        return Greedy()
    return NucleusSampler(settings.temperature, settings.top_p, settings.seed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of logits of which one at least is finite, of the same shape."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
