"""Open a model in training as the runtime opens a bundle, so that its drafts are those that will ship."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbedge.api import ReportGenerator
from cbedge.backends.torch_model import TorchBackend
from cbedge.bundles.bundle import QFORMER_TOKENIZER, TOKENIZER, Bundle
from cbedge.bundles.manifest import Manifest, Shapes
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.drafting.lexicon import Lexicon
from cbedge.drafting.templates import Templates
from cbedge.findings.reading import QFormerOutput
from cbedge.prompt import split_sections
from training.base import ModelAndTokenizers
from training.datasets import open_studies
from training.openings import with_denials
from training.special_tokens import prefix_ids, start_ids, stop_ids, suffix_ids
from training.templates import templates_of


@dataclass(frozen=True)
class ReportResources:
    """The parts of a bundle that are made from training reports; each is optional.

    Attributes:
        phrasebook: guesses the next tokens, which changes no draft.
        lexicon: the words that drafts may contain.
        templates: the normal reports that drafts follow.
    """

    phrasebook: Phrasebook | None = None
    lexicon: Lexicon | None = None
    templates: Templates | None = None

    @classmethod
    def learn(
        cls, parts: ModelAndTokenizers, data: Path, limit: int | None = None, with_templates: bool = False
    ) -> "ReportResources":
        """Make them from the training reports at ``data``.

        Args:
            limit: maximum number of reports for phrasebook and lexicon.
            with_templates: make templates too, if the model has finding scores; ``data`` must be IU X-RAY.
        """
        reports = [study.target for study in open_studies(data, ("train",), limit)]
        tokens = parts.tokenizer(reports, add_special_tokens=False).input_ids if reports else []
        head = parts.finding_head  # without its scores, a template would hide what the image shows
        return cls(
            Phrasebook.compile([*ids, parts.tokenizer.eos_token_id] for ids in tokens) if tokens else None,
            Lexicon.compile(" ".join(split_sections(report)) for report in reports) or None,
            templates_of(head.findings, data) if with_templates and head is not None else None,
        )


class ImageBlindBackend(TorchBackend):
    """A model that was trained without images: its language model reads the prompt alone."""

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """No features, float32 [1, 0, 1]."""
        return np.empty((1, 0, 1), np.float32)

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """No image embeddings, float32 [1, 0, D]."""
        width = self._model.config.text_config.hidden_size
        return QFormerOutput(np.empty((1, 0, width), np.float32), np.empty((1, 0), np.float32), None)


def open_run(
    parts: ModelAndTokenizers, resources: ReportResources = ReportResources(), image_blind: bool = False
) -> ReportGenerator:
    """A generator that drafts with a model in torch, by the pipeline of the runtime.

    Args:
        parts: the model, in evaluation mode and on its device; its adapters need not be merged.
        resources: the parts that its bundle would have.
        image_blind: the model was trained without images.
    """
    head = None if image_blind else parts.finding_head
    config = parts.model.config
    sizes = (config.vision_config.image_size, config.num_query_tokens, config.text_config.hidden_size)
    manifest = Manifest(
        name="run",
        version="0",
        license="none",
        shapes=Shapes(*sizes, 0, 0, 0),  # the others are those of ONNX graphs
        preprocessing=parts.preprocessing,
        stop_ids=stop_ids(parts),
        prefix_ids=prefix_ids(parts),
        suffix_ids=suffix_ids(parts),
        start_ids=start_ids(parts),
        default_variant="fp32",
        variants={},
        files={},
        image_findings=with_denials(head.findings) if head else None,
        reads_lateral=parts.reads_lateral and not image_blind,
    )
    kind = ImageBlindBackend if image_blind else TorchBackend
    backend = kind(parts.model, head.tensors if head else None)
    with tempfile.TemporaryDirectory() as folder:
        parts.tokenizer.backend_tokenizer.save(str(Path(folder, TOKENIZER)))
        parts.qformer_tokenizer.backend_tokenizer.save(str(Path(folder, QFORMER_TOKENIZER)))
        generator = ReportGenerator(Bundle(Path(folder), manifest), "fp32", backend, recent_studies=0)
    target = generator.resources
    target.phrasebook, target.lexicon, target.templates = resources.phrasebook, resources.lexicon, resources.templates
    return generator
