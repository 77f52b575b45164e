"""What ONNX Runtime's execution providers differ in."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cbedge.errors import DeviceError

if TYPE_CHECKING:
    from cbedge.backends.ort import OnnxBackend
    from cbedge.decoding import Decoder


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        device: what users call it.
        name: ONNX Runtime's name of it.
        new_decoder: makes a decoder for a backend and a capacity.
        install: said where the installed ONNX Runtime is not built for it.
        failure: said where it is built for it and does not start.
        memory: where its tensors lie, ``cpu`` or ``cuda``.
        is_repeatable: its kernels give an embedding the same keys and values whatever else is read in its pass, bit for
            bit.
        variants: those to take before the bundle's default, the best first.
        has_hardware: whether the machine has what it runs on, for ``auto``.
        prepare: is called before the first session.
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
    """See that exactly one build of ONNX Runtime is installed; the two builds overwrite each other's files.

    Raises:
        DeviceError: none is installed, or both are.
    """
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if is_installed(name)]
    if not present:
        raise DeviceError('ONNX Runtime is not installed; type: pip install "cbedge[cpu]" (or "cbedge[gpu]" for CUDA)')
    if len(present) == 2:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and break each other; type: "
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "cbedge[gpu]" (or "cbedge[cpu]")'
        )


def is_installed(distribution: str) -> bool:
    """Whether pip has installed a distribution."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
