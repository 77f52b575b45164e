"""Backends that run a variant of a bundle: ONNX Runtime, or transformers with bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import ENCODER, IN_INT8, Variant
from cbedge.decoding import Decoder

if TYPE_CHECKING:
    from cbedge.findings.reading import QFormerOutput


class Backend(Protocol):
    """A loaded variant of a bundle.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: number of CPU threads.
        vocabulary: size of the language model's vocabulary, V.
        decoder_only: whether the language model has no encoder, so that a prompt can be read in parts.
    """

    device: str
    threads: int
    vocabulary: int
    decoder_only: bool

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        ...

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """Vision features and token ids of the instruction, int64 [1, I] → the Q-Former's output."""
        ...

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, L] → embeddings, float32 [1, L, D]."""
        ...

    def new_decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty KV cache for up to ``capacity`` embeddings and tokens."""
        ...


def choose_variant(bundle: Bundle, name: str | None = None, device: str = "auto") -> tuple[str, str]:
    """The variant to run and the device to run it on, as (name, device).

    If ``name`` is ``None``: on a GPU, variants for GPUs are preferred to the bundle's default (ONNX Runtime supports an
    in-place KV cache on GPUs for 16 bits only). On a CPU with exact 8-bit multiplication,
    :data:`~cbedge.bundles.manifest.IN_INT8` is preferred to ``int4``, whose weights it reads. ``auto`` selects the CPU
    for a variant that is not for GPUs.

    Raises:
        BundleError: the bundle has no such variant.
        DeviceError: ONNX Runtime is not installed, or the device is not available.
    """
    usual, variant = bundle.variant(name)
    if variant.backend != "onnx":
        return usual, device
    from cbedge.backends.int8 import multiplies_exactly
    from cbedge.backends.registry import PROVIDERS, choose_device

    chosen = choose_device(device)
    variants, preferred = bundle.manifest.variants, PROVIDERS[chosen].variants
    if name is None:
        usual = next((one for one in preferred if one in variants), usual)
        is_cpu = not preferred or device == "auto"
        if usual == "int4" and IN_INT8 in variants and is_cpu and multiplies_exactly():
            usual = IN_INT8
    if device == "auto" and usual not in preferred and ENCODER not in variant.graphs:
        chosen = "cpu"  # faster for these variants
    return usual, chosen


def open_backend(bundle: Bundle, variant: Variant, device: str, threads: int | None = None) -> Backend:
    """Load a variant.

    Args:
        bundle: an opened bundle, its files verified.
        variant: one of its variants.
        device: ``auto`` or one of :data:`cbedge.backends.registry.PROVIDERS`.
        threads: CPU threads; default is one per core.

    Raises:
        BundleError: the variant cannot be loaded.
        DeviceError: a required package is not installed, or the device is not available.
    """
    if variant.backend == "torch_nf4":
        from cbedge.backends.torch_nf4 import open_nf4

        return open_nf4(bundle, variant, device, threads)
    from cbedge.backends.ort import OnnxBackend
    from cbedge.backends.registry import choose_device

    return OnnxBackend(bundle, variant, choose_device(device), threads)
