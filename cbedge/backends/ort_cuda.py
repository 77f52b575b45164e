"""ONNX Runtime's CUDA execution provider: its decoder looks tokens up on the GPU and replays CUDA graphs."""

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
from cbedge.bundles.bundle import FOR_GPUS

if TYPE_CHECKING:
    from cbedge.backends.ort import OnnxBackend

_RECORDED = (2, 5, 9, 17, 33)  # tokens in a recorded pass: others are padded to one of these
_PLACES = 256  # caches are as long as a multiple of it, so that they serve one report after another


class CudaMemory:
    """What the decoder reads and writes on the GPU, at places that never change: a CUDA graph holds addresses.

    Args:
        backend: whose sessions are used.
        capacity: embeddings and tokens to hold.
        drafts: how many.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int):
        self.drafts, self.capacity = drafts, capacity
        self._backend = backend
        arrays = empty_cache(backend, capacity, drafts)
        self.cache = {name: to_ortvalue(array, backend.memory) for name, array in arrays.items()}
        self.mask = to_ortvalue(np.zeros((drafts, capacity), np.int64), backend.memory)
        self._steps: dict[int, CudaStep] = {}

    def step(self, count: int) -> CudaStep:
        """What reads ``count`` more tokens in each draft."""
        if count not in self._steps:
            self._steps[count] = CudaStep(self._backend, self, count)
        return self._steps[count]


class CudaStep:
    """One more pass over the same number of tokens: the first time its kernels are recorded, then they are replayed as
    one CUDA graph. Started one by one, hundreds of short kernels would wait for ONNX Runtime.

    Args:
        backend: whose sessions are used.
        memory: what the decoder reads and writes.
        count: tokens that each draft reads.
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
        self._pass.bind_cpu_input(*backend.wanted(count))
        self._positions = (
            to_ortvalue(np.zeros((drafts, count), np.int64), backend.memory) if backend.told_positions else None
        )
        if self._positions is not None:
            self._pass.bind_ortvalue_input("position_ids", self._positions)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(CudaStep._next)))

    def run(self, token_ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, drafts * tokens], the attention mask, int64 [drafts, capacity], and the tokens' places,
        int64 [drafts, tokens] → logits, float32 [drafts, tokens, V]."""
        self.ids.update_inplace(token_ids)
        self._memory.mask.update_inplace(mask)
        if self._positions is not None:
            self._positions.update_inplace(positions)
        self._backend._embed.run_with_iobinding(self._look_up)
        self._backend._decoder.run_with_iobinding(self._pass, self._options)
        return self.logits.numpy()


class CudaDecoder(OnnxDecoder):
    """The language model on the GPU: tokens are looked up there, and a pass over a few is a CUDA graph.

    Each number of tokens would be a graph of its own: they are filled up to one of a few. What fills up is read behind
    all others, so they know nothing of it, and the next pass writes over it. The memory is the backend's, and is given
    back to it for the next report.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int = 1):
        import onnxruntime

        super().__init__(backend, capacity, drafts)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", "-1")  # prompts and openings differ: nothing is recorded

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
        """Read ``count`` tokens in each draft, of which ``kept`` are to be remembered."""
        positions = np.tile(np.arange(self.length, self.length + count, dtype=np.int64), (self.drafts, 1))
        mask = np.zeros((self.drafts, self._room), np.int64)
        mask[:, : self.length + count] = 1
        self._advance(kept)
        return self._memory.step(count).run(token_ids, mask, positions)


def _load_libraries() -> None:
    """Load CUDA and cuDNN where pip put them, which the system's loader does not search."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # what it does not find, a session misses and we say
            onnxruntime.preload_dlls()


def _has_nvidia_driver() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", r"C:\Windows\System32\nvcuda.dll"))


CUDA = Provider(
    device="cuda",
    name="CUDAExecutionProvider",
    new_decoder=CudaDecoder,
    install=(
        "CUDA was asked for, but the installed ONNX Runtime is the CPU build; type: "
        'pip uninstall -y onnxruntime && pip install "cbedge[gpu]", or give --device cpu'
    ),
    failure=(
        "CUDA was asked for, but ONNX Runtime could not start it: check the NVIDIA driver (nvidia-smi) and type: "
        'pip install "cbedge[gpu]" for the CUDA and cuDNN libraries, or give --device cpu'
    ),
    memory="cuda",
    variants=FOR_GPUS,
    has_hardware=_has_nvidia_driver,
    prepare=_load_libraries,
    # Multiply 4-bit weights as they are, with kernels chosen at loading, where they fit (blocks of 32).
    session_config={"ep.cuda.fpa_intb_gemm": "1"},
    decoder_options={"enable_cuda_graph": "1"},
)
