"""Run a bundle's graphs with ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbedge.backends.int8 import EXACT, Table, multiplies_exactly
from cbedge.bundles.bundle import ENCODER, GRAPHS, Bundle, Shapes, Variant
from cbedge.cores import usable_cores
from cbedge.decoding import Decoder
from cbedge.errors import BundleError, DeviceError
from cbedge.findings.reading import QFormerOutput

if TYPE_CHECKING:
    import onnxruntime

DEVICES = ("auto", "cpu", "cuda")
LOGITS_START = "logits_start"  # the decoder's input: from which position on logits are wanted, -1 the last alone
_RECORDED = (2, 5, 9, 17, 33)  # tokens in a pass of the GPU's: others are filled up to one of these
_PLACES = 256  # the GPU's caches are as long as a multiple of it, so that they serve one report after another


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


def choose_device(name: str) -> str:
    """Resolve ``auto`` to ``cuda`` where the installed ONNX Runtime is built for it, else ``cpu``.

    Raises:
        DeviceError: the name is unknown, or CUDA is asked for and this ONNX Runtime has none.
    """
    check_runtime()
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name[:20]!r}; give one of: {', '.join(DEVICES)}")
    if name == "cpu":
        return "cpu"
    import onnxruntime

    built_for_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if name == "auto":
        return "cuda" if built_for_cuda and _nvidia_driver() else "cpu"
    if not built_for_cuda:
        raise DeviceError(
            "CUDA was asked for, but the installed ONNX Runtime is the CPU build; type: "
            'pip uninstall -y onnxruntime && pip install "cbedge[gpu]", or give --device cpu'
        )
    return "cuda"


def _load_cuda_libraries() -> None:
    """Load CUDA and cuDNN where pip put them, which the system's loader does not search."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # what it does not find, a session misses and we say
            onnxruntime.preload_dlls()


class OnnxBackend:
    """The sessions of one variant of a bundle.

    Args:
        bundle: an opened bundle.
        variant: one of its variants.
        device: ``cpu`` or ``cuda``.
        threads: threads of the CPU sessions; default is one a core.

    Attributes:
        device, threads: as above.
        decoder_only: see :class:`cbedge.backends.Backend`.
        vocabulary: tokens that the language model knows, V.

    Raises:
        BundleError: a graph cannot be loaded.
        DeviceError: CUDA does not come up; there is no silent fall-back to the CPU.
    """

    def __init__(self, bundle: Bundle, variant: Variant, device: str, threads: int | None = None):
        self.device = device
        self.shapes: Shapes = bundle.manifest.shapes
        self.threads = threads or usable_cores()
        self.decoder_only = ENCODER not in variant.graphs
        if device == "cuda":
            _load_cuda_libraries()
        self._data = variant.data
        kinds = GRAPHS if self.decoder_only else (*GRAPHS, ENCODER)
        with ThreadPoolExecutor() as pool:  # sessions load in parallel: a cold start is what a user waits for
            sessions = list(pool.map(self._session, kinds, [bundle.folder / variant.graphs[kind] for kind in kinds]))
        self._vision, self._qformer, self._embed, self._decoder, *encoder = sessions
        self._encoder = encoder[0] if encoder else None
        self._start_ids = bundle.manifest.start_ids
        self._memory: defaultdict[tuple[int, int], list[CudaMemory]] = defaultdict(list)
        self._decoder_inputs = {node.name for node in self._decoder.get_inputs()}
        outputs = {output.name: output for output in self._decoder.get_outputs()}
        self.vocabulary = int(outputs["logits"].shape[-1])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        return self._vision.run(["image_features"], {"pixel_values": pixels})[0]

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """Ask the Q-Former.

        Args:
            features: of the vision encoder, float32 [1, P, H].
            instruction_ids: the Q-Former's tokens of the instruction, int64 [1, I].
        """
        feed = {"image_features": features, "qformer_input_ids": instruction_ids}
        embeds, attention, *logits = self._qformer.run(None, feed)
        return QFormerOutput(embeds, attention[0], logits[0][0] if logits else None)

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, L] → embeddings, float32 [1, L, D]."""
        return self._embed.run(["inputs_embeds"], {"input_ids": ids})[0]

    def new_decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty KV cache for at most ``capacity`` embeddings and tokens."""
        if not self.decoder_only:
            return OnnxEncoderDecoder(self, capacity)
        kind = CudaDecoder if self.device == "cuda" else OnnxDecoder
        return kind(self, capacity + 1)  # with a place to spare: see OnnxDecoder.append

    def wanted(self, count: int) -> tuple[str, np.ndarray]:
        """The decoder's input that asks for the logits of the last ``count`` positions."""
        if LOGITS_START in self._decoder_inputs:
            return LOGITS_START, np.array([-count], np.int64)
        return "num_logits", np.array([count], np.int64)  # in bundles of earlier exports

    @property
    def told_positions(self) -> bool:
        """Whether the decoder is told each token's place."""
        return "position_ids" in self._decoder_inputs

    def _session(self, kind: str, path: Path) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        # The threads of one graph would go on waiting awake for a while, and take the cores from the next graph's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = "CPUExecutionProvider"
        if self.device == "cuda":
            provider = "CUDAExecutionProvider"
            # Multiply 4-bit weights as they are, with kernels chosen at loading, where they fit (blocks of 32).
            options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")

        def load(**how: str) -> onnxruntime.InferenceSession:
            # Without fall-back, which would print and go on with the CPU.
            return onnxruntime.InferenceSession(str(path), options, providers=[(provider, how)], enable_fallback=0)

        table = Table.path(path)
        if table.name in self._data:
            if self.device == "cuda" or not multiplies_exactly():
                raise DeviceError("this variant is for x86 processors with AVX2: name another variant, or none")
            read = Table.read(table)
            if not {*read.sources} <= {*self._data}:  # which alone are verified
                raise BundleError(f"{table.name} names files that the variant does not: export the bundle again")
            made = read.initializers(path.parent)
            options.add_session_config_entry(*EXACT)
            options.add_external_initializers([*made], [*made.values()])
        try:
            session = None
            if kind == GRAPHS[-1] and self.device == "cuda" and self.decoder_only:
                with contextlib.suppress(Exception):  # a graph that cannot be captured runs kernel by kernel
                    session = load(enable_cuda_graph="1")
            session = session or load()
        except Exception as error:
            if self.device == "cuda":
                raise DeviceError(_cuda_failure()) from error
            raise BundleError(
                f"{path.name} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: update both"
            ) from error
        # ONNX Runtime goes on with the CPU when CUDA's libraries do not load; a session says what it really uses.
        if provider not in session.get_providers():
            raise DeviceError(_cuda_failure())
        return session


class OnnxDecoder:
    """The language model in the middle of one report, or of several drafts of one.

    Keys and values live where the session runs, in buffers of the full capacity that the graph reads and writes in
    place (past and present are the same memory): a token costs no copy of the cache, and forgetting costs nothing.

    Args:
        backend: whose sessions are used.
        capacity: embeddings and tokens to hold at most.
        drafts: how many.

    Attributes:
        reused: embeddings of the last prompt that it did not read again.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int = 1):
        self.capacity, self.drafts = capacity, drafts
        self.length = 0
        self._backend, self._session = backend, backend._decoder
        self._binding = self._session.io_binding()
        self._room = self._hold_cache()
        self._logits = np.empty(0, np.float32)
        self._options: onnxruntime.RunOptions | None = None
        self._prompt, self.reused = np.empty((0, backend.shapes.hidden_size), np.float32), 0

    def _hold_cache(self) -> int:
        """Bind an empty cache; returns for how many embeddings and tokens it has room."""
        # The session reads and writes these arrays themselves.
        self._arrays = empty_cache(self._backend, self.capacity, self.drafts)
        self._cache = {name: held(array, self._backend.device) for name, array in self._arrays.items()}
        bind_cache(self._binding, self._cache)
        return self.capacity

    @property
    def keeps_prompt(self) -> bool:
        """Whether another prompt need not be read where it begins as the last one did: on a CPU, whose kernels give an
        embedding the same keys and values whatever else is read in its pass, bit for bit. For those of a GPU nobody has
        seen to that."""
        return self._backend.device == "cpu"

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V].

        A decoder that has read a prompt before forgets it, but for what the new one begins with where it
        :attr:`keeps_prompt`.
        """
        known = self._prompt[: max(0, embeds.shape[1] - 2)]  # for one alone other kernels are taken: see append
        differing = np.flatnonzero((known != embeds[0, : len(known)]).any(-1))
        self.reused = int(differing[0]) if len(differing) else len(known)
        self.rewind(self.reused)
        logits = self._run(embeds[:, self.reused :], 1)[0, 0].copy()
        if self.keeps_prompt:
            self._prompt = embeds[0]
        return logits

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V], to be used before the next call.

        One alone is read twice, and the second time forgotten: other kernels compute one row than several, their sums
        differ in the last digits, and a guess that is checked among others would seldom get another answer than the
        token that is read alone. A GPU reads two no slower: 3.3 ms instead of 3.7 with 7B in 4 bits on an H100, whose
        kernels for one row are other ones, too (``benchmarks/results/gpu_h100.md``).
        """
        alone = len(token_ids) == 1 and self.length + 2 <= self.capacity
        rows = self._read(np.array([[*token_ids, *token_ids] if alone else token_ids], np.int64))
        if alone:
            self.rewind(self.length - 1)
        return rows[: len(token_ids)]

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V], to be used before the
        next call."""
        embeds = self._backend.embed_tokens(np.array([token_ids], np.int64))
        return self._run(embeds.reshape(self.drafts, 1, -1), 1)[:, 0]

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length``."""
        self.length = min(self.length, length)
        self._prompt = self._prompt[: self.length]

    def fork(self, rows: Sequence[int]) -> OnnxDecoder:
        """A decoder of many drafts, each of which has read what the draft in ``rows`` has."""
        other = type(self)(self._backend, self.capacity, len(rows))
        other._copy_rows(self, list(rows))
        return other

    def enlarged(self, capacity: int) -> OnnxDecoder:
        """A new decoder for ``capacity`` that has read the prompt that this one keeps, and nothing else."""
        self.rewind(len(self._prompt))
        other = self._backend.new_decoder(capacity)
        assert isinstance(other, OnnxDecoder)
        other._copy_rows(self, [0])
        other._prompt = self._prompt
        return other

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, tokens], of the one draft → logits after each, float32 [tokens, V]."""
        return self._run(self._backend.embed_tokens(token_ids), token_ids.shape[1])[0]

    def _copy_rows(self, source: OnnxDecoder, rows: list[int]) -> None:
        """Copy drafts of another decoder."""
        self.length = source.length
        for name, array in self._arrays.items():
            array[:, :, : self.length] = source._arrays[name][rows, :, : self.length]

    def _advance(self, count: int) -> None:
        """Count what is read now."""
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} tokens do not fit a decoder made for {self.capacity}")
        self.length += count

    def _run(self, embeds: np.ndarray, wanted: int) -> np.ndarray:
        start = self.length
        self._advance(embeds.shape[1])
        binding = self._binding
        mask = np.ones((self.drafts, self.length), np.int64)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds, np.float32))
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input(*self._backend.wanted(wanted))
        if self._backend.told_positions:
            positions = np.tile(np.arange(start, self.length, dtype=np.int64), (self.drafts, 1))
            binding.bind_cpu_input("position_ids", positions)
        shape = (self.drafts, wanted, self._backend.vocabulary)
        if self._logits.size < math.prod(shape):
            self._logits = np.empty(math.prod(shape), np.float32)
        logits = self._logits[: math.prod(shape)].reshape(shape)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding, self._options)
        return logits


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
        self.cache = {name: held(array, backend.device) for name, array in arrays.items()}
        self.mask = held(np.zeros((drafts, capacity), np.int64), backend.device)
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
        self.ids = held(np.zeros((1, drafts * count), np.int64), backend.device)
        self.embeds = held(np.zeros((drafts, count, width), np.float32), backend.device)
        self.logits = held(np.zeros((drafts, count, backend.vocabulary), np.float32), backend.device)
        self._look_up = backend._embed.io_binding()
        self._look_up.bind_ortvalue_input("input_ids", self.ids)
        flat = (1, drafts * count, width)
        self._look_up.bind_output("inputs_embeds", backend.device, 0, np.float32, flat, self.embeds.data_ptr())
        self._pass = backend._decoder.io_binding()
        bind_cache(self._pass, memory.cache)
        self._pass.bind_ortvalue_input("inputs_embeds", self.embeds)
        self._pass.bind_ortvalue_input("attention_mask", memory.mask)
        self._pass.bind_ortvalue_output("logits", self.logits)
        self._pass.bind_cpu_input(*backend.wanted(count))
        self._positions = held(np.zeros((drafts, count), np.int64), backend.device) if backend.told_positions else None
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
        free = self._backend._memory[self.drafts, room]
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


class OnnxEncoderDecoder:
    """An encoder-decoder (Flan-T5) in the middle of one report, or of several drafts of one.

    Image embeddings and prompt are read by the encoder, once; the cache holds what was written alone. Keys and values
    stay where the sessions run. A pass copies the cache, which is small beside the weights that it reads.

    Args:
        backend: whose sessions are used.
        capacity: embeddings and tokens to hold at most.
    """

    def __init__(self, backend: OnnxBackend, capacity: int):
        self.capacity, self.length, self.reused, self.keeps_prompt = capacity, 0, 0, False
        self._backend = backend
        names = [f"{i}.{kind}" for i in range(backend.shapes.num_layers) for kind in ("key", "value")]
        self._past, self._crossed = ([f"{part}.{name}" for name in names] for part in ("past_key_values", "cross"))
        self._cache: dict[str, onnxruntime.OrtValue] = {}
        self._cross: dict[str, onnxruntime.OrtValue] = {}

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits of the draft's first token, float32 [V]."""
        backend = self._backend
        assert backend._encoder is not None
        self.length = embeds.shape[1] - len(backend._start_ids)  # what the decoder begins with is not counted
        given = {"inputs_embeds": self._held(np.ascontiguousarray(embeds, np.float32))}
        self._cross = self._bound(backend._encoder, given, self._crossed)
        shapes = backend.shapes
        empty = np.zeros((1, shapes.num_key_value_heads, 0, shapes.head_size), np.float32)
        self._cache = {name: self._held(empty) for name in self._past}
        return self._run(backend.embed_tokens(np.array([backend._start_ids], np.int64)))[0, -1].copy()

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V]."""
        return self._run(self._backend.embed_tokens(np.array([token_ids], np.int64)))[0]

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        embeds = self._backend.embed_tokens(np.array([token_ids], np.int64))
        return self._run(embeds.reshape(len(token_ids), 1, -1))[:, 0]

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length``."""
        gone = self.length - length
        if gone > 0:
            self._cache = {
                name: self._held(np.ascontiguousarray(v.numpy()[:, :, :-gone])) for name, v in self._cache.items()
            }
            self.length = length

    def fork(self, rows: Sequence[int]) -> OnnxEncoderDecoder:
        """A decoder of many drafts, each of which has read what the draft in ``rows`` has."""
        other = OnnxEncoderDecoder(self._backend, self.capacity)
        other.length, chosen = self.length, list(rows)
        for ours, theirs in ((other._cache, self._cache), (other._cross, self._cross)):
            ours |= {name: self._held(value.numpy()[chosen]) for name, value in theirs.items()}
        return other

    def enlarged(self, capacity: int) -> OnnxEncoderDecoder:
        """Itself: its cache grows with what it reads."""
        self.capacity = capacity
        return self

    def _run(self, embeds: np.ndarray) -> np.ndarray:
        self.length += embeds.shape[1]
        if self.length > self.capacity:
            raise ValueError(f"{self.length} tokens do not fit a decoder made for {self.capacity}")
        session = self._backend._decoder
        given = {"inputs_embeds": self._held(np.ascontiguousarray(embeds, np.float32)), **self._cache, **self._cross}
        present = [name.replace("past_key_values", "present") for name in self._past]
        found = self._bound(session, given, ["logits", *present])
        self._cache = {name: found[new] for name, new in zip(self._past, present, strict=True)}
        return found["logits"].numpy()

    def _held(self, array: np.ndarray) -> onnxruntime.OrtValue:
        return held(array, self._backend.device)

    def _bound(
        self, session: onnxruntime.InferenceSession, given: dict[str, onnxruntime.OrtValue], wanted: Sequence[str]
    ) -> dict[str, onnxruntime.OrtValue]:
        """Run a session on what lies where it runs, and leave what comes out there."""
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, "cpu" if name == "logits" else self._backend.device)
        session.run_with_iobinding(binding)
        return dict(zip(wanted, binding.get_outputs(), strict=True))


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


def held(array: np.ndarray, device: str) -> onnxruntime.OrtValue:
    """An array where a session of ``device``, ``cpu`` or ``cuda``, reads it; on the CPU it stays itself."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)


def is_installed(distribution: str) -> bool:
    """Whether pip has installed a distribution."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _nvidia_driver() -> bool:
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", r"C:\Windows\System32\nvcuda.dll"))


def _cuda_failure() -> str:
    return (
        "CUDA was asked for, but ONNX Runtime could not start it: check the NVIDIA driver (nvidia-smi) and type: "
        'pip install "cbedge[gpu]" for the CUDA and cuDNN libraries, or give --device cpu'
    )
