"""Samplers: choose a token from processed logits."""

from __future__ import annotations

import numpy as np

from cbedge.decoding.protocol import Sampler
from cbedge.decoding.settings import Decoding

# Minimum probability of a sampled token relative to the most probable one (min-p sampling, Nguyen et al. 2024).
MIN_P = 0.02


class Greedy:
    """Selects the most probable token."""

    is_greedy = True

    def __call__(self, logits: np.ndarray) -> int:
        """See :class:`~cbedge.decoding.Sampler`."""
        return int(logits.argmax())


class NucleusSampler:
    """Nucleus sampling (Holtzman et al. 2020) combined with min-p sampling (:data:`MIN_P`).

    Args:
        temperature: sampling temperature, above 0.
        top_p: total probability of the nucleus, above 0, at most 1.
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
    """The sampler for decoding settings."""
    if settings.temperature == 0:
        return Greedy()
    return NucleusSampler(settings.temperature, settings.top_p, settings.seed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits, of the same shape; at least one logit must be finite."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
