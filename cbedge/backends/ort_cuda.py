"""The CUDA execution provider of ONNX Runtime, whose decoder embeds tokens on the GPU and replays CUDA graphs."""

from __future__ import annotations

import contextlib
import io
import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbedge.backends.kv_cache import bind_cache, empty_cache, to_ortvalue
from cbedge.backends.ort_decoder import OnnxDecoder
from cbedge.backends.provider import Provider
from cbedge.bundles.manifest import FOR_GPUS
from cbedge.errors import install_extra

if TYPE_CHECKING:
    from cbedge.backends.ort import OnnxBackend

_RECORDED = (2, 5, 9, 17, 33)  # tokens in a recorded pass; other counts are padded to one of these
_PLACES = 256  # cache lengths are multiples of this, so that caches can be reused


class CudaMemory:
    """Buffers of the decoder on the GPU, with fixed addresses as CUDA graphs require.

    Args:
        backend: whose sessions are used.
        capacity: number of embeddings and tokens.
        drafts: number of drafts.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int):
        self.drafts, self.capacity = drafts, capacity
        self._backend = backend
        arrays = empty_cache(backend, capacity, drafts)
        self.cache = {name: to_ortvalue(array, backend.memory) for name, array in arrays.items()}
        self.mask = to_ortvalue(np.zeros((drafts, capacity), np.int64), backend.memory)
        self._steps: dict[int, CudaStep] = {}

    def step(self, count: int) -> CudaStep:
        """The pass over ``count`` more tokens in each draft."""
        if count not in self._steps:
            self._steps[count] = CudaStep(self._backend, self, count)
        return self._steps[count]


class CudaStep:
    """A pass over a fixed number of tokens. Its kernels are recorded in the first run and then replayed as one CUDA
    graph, because launching hundreds of short kernels one by one is slow.

    Args:
        backend: whose sessions are used.
        memory: what the decoder reads and writes.
        count: number of tokens per draft.
    """

    _next = itertools.count(1)

    def __init__(self, backend: OnnxBackend, memory: CudaMemory, count: int):
        import onnxruntime

        self._backend, self._memory = backend, memory
        drafts, width = memory.drafts, backend.shapes.hidden_size
        self.ids = to_ortvalue(np.zeros((1, drafts * count), np.int64), backend.memory)
        self.embeds = to_ortvalue(np.zeros((drafts, count, width), np.float32), backend.memory)
        self.logits = to_ortvalue(np.zeros((drafts, count, backend.vocabulary), np.float32), backend.memory)
        self._look_up = backend._embed.io_binding()
        self._look_up.bind_ortvalue_input("input_ids", self.ids)
        flat = (1, drafts * count, width)
        self._look_up.bind_output("inputs_embeds", backend.memory, 0, np.float32, flat, self.embeds.data_ptr())
        self._pass = backend._decoder.io_binding()
        bind_cache(self._pass, memory.cache)
        self._pass.bind_ortvalue_input("inputs_embeds", self.embeds)
        self._pass.bind_ortvalue_input("attention_mask", memory.mask)
        self._pass.bind_ortvalue_output("logits", self.logits)
        self._pass.bind_cpu_input(*backend.logits_request(count))
        self._positions = (
            to_ortvalue(np.zeros((drafts, count), np.int64), backend.memory) if backend.has_position_ids else None
        )
        if self._positions is not None:
            self._pass.bind_ortvalue_input("position_ids", self._positions)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(CudaStep._next)))

    def run(self, token_ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, drafts * tokens], attention mask, int64 [drafts, capacity], and positions,
        int64 [drafts, tokens] → logits, float32 [drafts, tokens, V]."""
        self.ids.update_inplace(token_ids)
        self._memory.mask.update_inplace(mask)
        if self._positions is not None:
            self._positions.update_inplace(positions)
        self._backend._embed.run_with_iobinding(self._look_up)
        self._backend._decoder.run_with_iobinding(self._pass, self._options)
        return self.logits.numpy()


class CudaDecoder(OnnxDecoder):
    """The decoder on the GPU: embeds tokens there, and runs a pass over a few tokens as a CUDA graph.

    Each number of tokens needs its own graph, so tokens are padded to one of a few sizes. The padding comes last, so it
    does not affect the other tokens, and the next pass overwrites it. The buffers belong to the backend and are
    returned to it for the next report.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int = 1):
        import onnxruntime

        super().__init__(backend, capacity, drafts)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", "-1")  # prompts and openings vary in length: record nothing

    def _hold_cache(self) -> int:
        room = -(-self.capacity // _PLACES) * _PLACES
        free = self._backend.free_memory[self.drafts, room]
        self._memory = free.pop() if free else CudaMemory(self._backend, room, self.drafts)
        weakref.finalize(self, free.append, self._memory)
        bind_cache(self._binding, self._memory.cache)
        return room

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        return self._step(np.array([token_ids], np.int64), 1, 1)[:, 0]

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        count = token_ids.shape[1]
        size = next((size for size in _RECORDED if size >= count), None)
        if size is None or self.length + size > self._room:
            return super()._read(token_ids)
        filled = np.pad(token_ids, ((0, 0), (0, size - count)), mode="edge")
        return self._step(filled, size, count)[0, :count]

    def _copy_rows(self, source: OnnxDecoder, rows: list[int]) -> None:
        assert isinstance(source, CudaDecoder)
        self.length = source.length
        for name, value in self._memory.cache.items():
            array = value.numpy()
            array[:, :, : self.length] = source._memory.cache[name].numpy()[rows, :, : self.length]
            value.update_inplace(array)

    def _step(self, token_ids: np.ndarray, count: int, kept: int) -> np.ndarray:
        """Read ``count`` tokens in each draft, of which the first ``kept`` stay in the cache."""
        positions = np.tile(np.arange(self.length, self.length + count, dtype=np.int64), (self.drafts, 1))
        mask = np.zeros((self.drafts, self._room), np.int64)
        mask[:, : self.length + count] = 1
        self._advance(kept)
        return self._memory.step(count).run(token_ids, mask, positions)


def _load_libraries() -> None:
    """Load CUDA and cuDNN from pip's packages, which the system loader does not search."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # missing libraries are reported by the session
            onnxruntime.preload_dlls()


def _has_nvidia_driver() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", r"C:\Windows\System32\nvcuda.dll"))


CUDA = Provider(
    device="cuda",
    name="CUDAExecutionProvider",
    new_decoder=CudaDecoder,
    install=(
        "CUDA was requested, but the installed ONNX Runtime is the CPU build: give --device cpu, or type: "
        f"pip uninstall -y onnxruntime, then {install_extra('gpu')}"
    ),
    failure=(
        "CUDA was requested, but ONNX Runtime could not start it: give --device cpu, or check the NVIDIA driver "
        f"(nvidia-smi) and install CUDA and cuDNN; type: {install_extra('gpu')}"
    ),
    memory="cuda",
    variants=FOR_GPUS,
    has_hardware=_has_nvidia_driver,
    prepare=_load_libraries,
    # Use kernels for 4-bit weights, selected when the model is loaded, where they are supported (blocks of 32).
    session_config={"ep.cuda.fpa_intb_gemm": "1"},
    decoder_options={"enable_cuda_graph": "1"},
)
