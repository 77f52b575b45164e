"""Keys and values of a decoder, held where its session runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

    from cbedge.backends.ort import OnnxBackend


def empty_cache(backend: OnnxBackend, capacity: int, drafts: int) -> dict[str, np.ndarray]:
    """Keys and values of nothing, as the decoder wants them: name → float32 or 16 [drafts, heads, capacity, size]."""
    shapes = backend.shapes
    half = any(node.type == "tensor(float16)" for node in backend._decoder.get_inputs())
    shape = (drafts, shapes.num_key_value_heads, capacity, shapes.head_size)
    names = [f"{i}.{kind}" for i in range(shapes.num_layers) for kind in ("key", "value")]
    return {name: np.zeros(shape, np.float16 if half else np.float32) for name in names}


def bind_cache(binding: onnxruntime.IOBinding, cache: dict[str, onnxruntime.OrtValue]) -> None:
    """Give a binding keys and values, to be read and written in place."""
    for name, value in cache.items():
        binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        binding.bind_ortvalue_output(f"present.{name}", value)


def to_ortvalue(array: np.ndarray, device: str) -> onnxruntime.OrtValue:
    """An array where a session of ``device``, ``cpu`` or ``cuda``, reads it; on the CPU it stays itself."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)
