"""Settings of an ONNX Runtime execution provider."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cbedge.errors import DeviceError, install_extra

if TYPE_CHECKING:
    from cbedge.backends.ort import OnnxBackend
    from cbedge.decoding import Decoder


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        device: name for users.
        name: name in ONNX Runtime.
        new_decoder: creates a decoder for a backend and a capacity.
        install: error message if the installed ONNX Runtime does not support it.
        failure: error message if it is supported but does not start.
        memory: device of its tensors, ``cpu`` or ``cuda``.
        is_repeatable: whether its kernels compute bit-identical keys and values for an embedding, regardless of the
            other embeddings in a pass.
        variants: variants that are preferred to the bundle's default, best first.
        has_hardware: whether the machine has the hardware, for ``auto``.
        prepare: called before the first session is created.
        session_config: entries of the session options.
        decoder_options: provider options of the decoder's session, tried first.
    """

    device: str
    name: str
    new_decoder: Callable[[OnnxBackend, int], Decoder]
    install: str
    failure: str
    memory: str = "cpu"
    is_repeatable: bool = False
    variants: tuple[str, ...] = ()
    has_hardware: Callable[[], bool] = lambda: True
    prepare: Callable[[], None] = lambda: None
    session_config: Mapping[str, str] = field(default_factory=dict)
    decoder_options: Mapping[str, str] = field(default_factory=dict)


def check_runtime() -> None:
    """Check that exactly one build of ONNX Runtime is installed; the two builds overwrite each other's files.

    Raises:
        DeviceError: none or both are installed.
    """
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if is_installed(name)]
    if not present:
        raise DeviceError(f"ONNX Runtime is not installed; type (for CUDA: gpu instead of cpu) {install_extra('cpu')}")
    if len(present) == 2:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed, which does not work; type: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then (for CUDA: gpu instead of cpu) " + install_extra("cpu")
        )


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
