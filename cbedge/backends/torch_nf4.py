"""Open a bundle's NF4 variant: the language model's linear layers are in 4-bit NormalFloat (bitsandbytes).

It saves memory, not time: the ONNX variants are faster.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from cbedge.backends.torch_model import TorchBackend
from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import Variant
from cbedge.errors import BundleError, DeviceError

# File name in a bundle → file name in transformers.
FILES = {"nf4_config.json": "config.json", "nf4_model.safetensors": "model.safetensors"}
DEVICES = ("auto", "cpu", "cuda")  # torch's
HEAD = "nf4_finding_head.safetensors"
INSTALL = 'pip install torch "transformers>=5.20" bitsandbytes accelerate safetensors'


def open_nf4(bundle: Bundle, variant: Variant, device: str, threads: int | None = None) -> TorchBackend:
    """Load an NF4 variant.

    Args:
        bundle: an opened bundle.
        variant: its NF4 variant.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; default is torch's own.

    Raises:
        DeviceError: torch, transformers or bitsandbytes is missing, or CUDA is requested and not available.
        BundleError: the files cannot be loaded.
    """
    try:
        import bitsandbytes  # noqa: F401
        import torch
        from safetensors.torch import load_file
        from transformers import InstructBlipForConditionalGeneration
    except ImportError as error:
        raise DeviceError(f"the nf4 variant needs the package {error.name}; type: {INSTALL}") from None
    device = _choose(device, torch.cuda.is_available())
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, theirs in FILES.items():
            Path(scratch, theirs).symlink_to((bundle.folder / ours).absolute())
        try:
            model = InstructBlipForConditionalGeneration.from_pretrained(
                scratch, device_map=device, attn_implementation={"qformer_config": "eager"}
            ).eval()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(f"the nf4 variant cannot be loaded ({reason}): export it again") from error
    return TorchBackend(model, load_file(bundle.folder / HEAD) if HEAD in variant.data else None)


def _choose(device: str, cuda: bool) -> str:
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device[:20]!r}; give one of: {', '.join(DEVICES)}")
    if device == "cuda" and not cuda:
        raise DeviceError("CUDA was requested, but torch finds no CUDA device: check nvidia-smi, or give --device cpu")
    return "cuda" if cuda and device != "cpu" else "cpu"
