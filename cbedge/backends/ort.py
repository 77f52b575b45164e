"""Run a bundle's graphs with ONNX Runtime, on any execution provider."""

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
from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import ENCODER, GRAPHS, Shapes, Variant
from cbedge.cores import usable_cores
from cbedge.decoding import Decoder
from cbedge.errors import BundleError, DeviceError
from cbedge.findings.reading import QFormerOutput

if TYPE_CHECKING:
    import onnxruntime

LOGITS_START = "logits_start"  # input of the decoder: first position with logits; -1 for the last one only


class OnnxBackend:
    """The ONNX Runtime sessions of one variant of a bundle.

    Args:
        bundle: an opened bundle.
        variant: one of its variants.
        device: a key of :data:`cbedge.backends.registry.PROVIDERS`.
        threads: threads of the CPU sessions; default is one per core.

    Attributes:
        device, threads: as above.
        decoder_only: see :class:`cbedge.backends.Backend`.
        vocabulary: size of the language model's vocabulary, V.

    Raises:
        BundleError: a graph cannot be loaded.
        DeviceError: the device does not start. There is no silent fallback to the CPU.
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
        with ThreadPoolExecutor() as pool:  # load sessions in parallel for a faster cold start
            sessions = list(pool.map(self._session, kinds, [bundle.folder / variant.graphs[kind] for kind in kinds]))
        self._vision, self._qformer, self._embed, self._decoder, *encoder = sessions
        self._encoder = encoder[0] if encoder else None
        self._start_ids = bundle.manifest.start_ids
        self.free_memory: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)  # of finished reports
        self._decoder_inputs = {node.name for node in self._decoder.get_inputs()}
        outputs = {output.name: output for output in self._decoder.get_outputs()}
        self.vocabulary = int(outputs["logits"].shape[-1])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        return self._vision.run(["image_features"], {"pixel_values": pixels})[0]

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """Run the Q-Former.

        Args:
            features: vision features, float32 [1, P, H].
            instruction_ids: token ids of the instruction, int64 [1, I].
        """
        feed = {"image_features": features, "qformer_input_ids": instruction_ids}
        embeds, attention, *logits = self._qformer.run(None, feed)
        return QFormerOutput(embeds, attention[0], logits[0][0] if logits else None)

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, L] → embeddings, float32 [1, L, D]."""
        return self._embed.run(["inputs_embeds"], {"input_ids": ids})[0]

    def new_decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty KV cache for up to ``capacity`` embeddings and tokens."""
        if not self.decoder_only:
            return OnnxEncoderDecoder(self, capacity)
        return self.provider.new_decoder(self, capacity + 1)  # one extra position: see OnnxDecoder.append

    def logits_request(self, count: int) -> tuple[str, np.ndarray]:
        """The decoder input that requests the logits of the last ``count`` positions, as (name, value)."""
        if LOGITS_START in self._decoder_inputs:
            return LOGITS_START, np.array([-count], np.int64)
        return "num_logits", np.array([count], np.int64)  # in bundles of older exports

    @property
    def has_position_ids(self) -> bool:
        """Whether the decoder has an input for token positions."""
        return "position_ids" in self._decoder_inputs

    def _session(self, kind: str, path: Path) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well
        options.intra_op_num_threads = self.threads
        # Otherwise the threads of one graph spin for a while after a run and slow down the next graph.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = self.provider
        for key, value in provider.session_config.items():
            options.add_session_config_entry(key, value)

        def load(how: Mapping[str, str]) -> onnxruntime.InferenceSession:
            # No fallback, which would print a message and continue on the CPU.
            return onnxruntime.InferenceSession(str(path), options, providers=[(provider.name, how)], enable_fallback=0)

        table = Table.path(path)
        if table.name in self._data:
            if provider.memory != "cpu" or not multiplies_exactly():
                raise DeviceError("this variant needs an x86 processor with AVX2: choose another --variant, or omit it")
            read = Table.read(table)
            if not {*read.sources} <= {*self._data}:  # only these were verified
                raise BundleError(
                    f"{table.name} refers to files that the variant does not list: export the bundle again"
                )
            made = read.initializers(path.parent)
            options.add_session_config_entry(*EXACT)
            options.add_external_initializers([*made], [*made.values()])
        try:
            session = None
            if kind == GRAPHS[-1] and provider.decoder_options and self.decoder_only:
                with contextlib.suppress(Exception):  # without CUDA graph capture, kernels run one by one
                    session = load(provider.decoder_options)
            session = session or load({})
        except Exception as error:
            if provider.name != "CPUExecutionProvider":
                raise DeviceError(provider.failure) from error
            raise BundleError(
                f"{path.name} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: update both"
            ) from error
        # ONNX Runtime silently uses the CPU if a provider's libraries cannot be loaded, so the session is checked.
        if provider.name not in session.get_providers():
            raise DeviceError(provider.failure)
        return session
