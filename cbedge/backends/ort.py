"""Run a bundle's graphs with ONNX Runtime, on any of its execution providers."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.backends.encoder_decoder import OnnxEncoderDecoder
from cbedge.backends.int8 import EXACT, Table, multiplies_exactly
from cbedge.backends.registry import PROVIDERS
from cbedge.bundles.bundle import ENCODER, GRAPHS, Bundle, Shapes, Variant
from cbedge.cores import usable_cores
from cbedge.decoding import Decoder
from cbedge.errors import BundleError, DeviceError
from cbedge.findings.reading import QFormerOutput

if TYPE_CHECKING:
    import onnxruntime

LOGITS_START = "logits_start"  # the decoder's input: from which position on logits are wanted, -1 the last alone


class OnnxBackend:
    """The sessions of one variant of a bundle.

    Args:
        bundle: an opened bundle.
        variant: one of its variants.
        device: of :data:`cbedge.backends.registry.PROVIDERS`.
        threads: threads of the CPU sessions; default is one per core.

    Attributes:
        device, threads: as above.
        decoder_only: see :class:`cbedge.backends.Backend`.
        vocabulary: tokens that the language model knows, V.

    Raises:
        BundleError: a graph cannot be loaded.
        DeviceError: the device does not start; there is no silent fall-back to the CPU.
    """

    def __init__(self, bundle: Bundle, variant: Variant, device: str, threads: int | None = None):
        self.device, self.provider = device, PROVIDERS[device]
        self.memory = self.provider.memory
        self.shapes: Shapes = bundle.manifest.shapes
        self.threads = threads or usable_cores()
        self.decoder_only = ENCODER not in variant.graphs
        self.provider.prepare()
        self._data = variant.data
        kinds = GRAPHS if self.decoder_only else (*GRAPHS, ENCODER)
        with ThreadPoolExecutor() as pool:  # sessions load in parallel: a cold start is what a user waits for
            sessions = list(pool.map(self._session, kinds, [bundle.folder / variant.graphs[kind] for kind in kinds]))
        self._vision, self._qformer, self._embed, self._decoder, *encoder = sessions
        self._encoder = encoder[0] if encoder else None
        self._start_ids = bundle.manifest.start_ids
        self.free_memory: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)  # of ended reports
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
        return self.provider.new_decoder(self, capacity + 1)  # with a place to spare: see OnnxDecoder.append

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
        provider = self.provider
        for key, value in provider.session_config.items():
            options.add_session_config_entry(key, value)

        def load(how: Mapping[str, str]) -> onnxruntime.InferenceSession:
            # Without fall-back, which would print and go on with the CPU.
            return onnxruntime.InferenceSession(str(path), options, providers=[(provider.name, how)], enable_fallback=0)

        table = Table.path(path)
        if table.name in self._data:
            if provider.memory != "cpu" or not multiplies_exactly():
                raise DeviceError("this variant is for x86 processors with AVX2: name another variant, or none")
            read = Table.read(table)
            if not {*read.sources} <= {*self._data}:  # which alone are verified
                raise BundleError(f"{table.name} names files that the variant does not: export the bundle again")
            made = read.initializers(path.parent)
            options.add_session_config_entry(*EXACT)
            options.add_external_initializers([*made], [*made.values()])
        try:
            session = None
            if kind == GRAPHS[-1] and provider.decoder_options and self.decoder_only:
                with contextlib.suppress(Exception):  # a graph that cannot be captured runs kernel by kernel
                    session = load(provider.decoder_options)
            session = session or load({})
        except Exception as error:
            if provider.name != "CPUExecutionProvider":
                raise DeviceError(provider.failure) from error
            raise BundleError(
                f"{path.name} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: update both"
            ) from error
        # ONNX Runtime goes on with the CPU when a provider's libraries do not load; a session says what it really uses.
        if provider.name not in session.get_providers():
            raise DeviceError(provider.failure)
        return session
