"""KV cache of a decoder, on the device of its session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

    from cbedge.backends.ort import OnnxBackend


def empty_cache(backend: OnnxBackend, capacity: int, drafts: int) -> dict[str, np.ndarray]:
    """An empty KV cache in the decoder's format: name → float32 or float16 [drafts, heads, capacity, size]."""
    shapes = backend.shapes
    half = any(node.type == "tensor(float16)" for node in backend._decoder.get_inputs())
    shape = (drafts, shapes.num_key_value_heads, capacity, shapes.head_size)
    names = [f"{i}.{kind}" for i in range(shapes.num_layers) for kind in ("key", "value")]
    return {name: np.zeros(shape, np.float16 if half else np.float32) for name in names}


def bind_cache(binding: onnxruntime.IOBinding, cache: dict[str, onnxruntime.OrtValue]) -> None:
    """Bind a KV cache as input and output, so that it is updated in place."""
    for name, value in cache.items():
        binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        binding.bind_ortvalue_output(f"present.{name}", value)


def to_ortvalue(array: np.ndarray, device: str) -> onnxruntime.OrtValue:
    """An array on ``device``, ``cpu`` or ``cuda``; on the CPU, the memory is shared."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)
