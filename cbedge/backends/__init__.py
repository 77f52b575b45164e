"""What runs a bundle's variant: ONNX Runtime, or transformers with bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from cbedge.bundle import Bundle, Variant
from cbedge.decoding import Decoder

if TYPE_CHECKING:
    from cbedge.backends.onnx import Queried


class Backend(Protocol):
    """One variant of a bundle, ready to run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        decoder_only: whether prompt and draft are read alike, so that a prompt may be read in parts.
    """

    device: str
    threads: int
    decoder_only: bool

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        ...

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> Queried:
        """Features and the Q-Former's tokens of the instruction, int64 [1, I] → what it answers."""
        ...

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, L] → embeddings, float32 [1, L, D]."""
        ...

    def new_decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty KV cache for at most ``capacity`` embeddings and tokens."""
        ...


def open_backend(bundle: Bundle, variant: Variant, device: str, threads: int | None = None) -> Backend:
    """Load a variant.

    Args:
        bundle: an opened bundle, its files verified.
        variant: one of its variants.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; default is one a core.

    Raises:
        BundleError: it cannot be loaded.
        DeviceError: what it needs is not installed, or the device is not to be had.
    """
    if variant.backend == "torch_nf4":
        from cbedge.backends.torch_nf4 import TorchNf4Backend

        return TorchNf4Backend(bundle, variant, device, threads)
    from cbedge.backends.onnx import OnnxBackend, choose_device

    return OnnxBackend(bundle, variant, choose_device(device), threads)
