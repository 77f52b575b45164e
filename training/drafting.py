"""Draft the reports of many studies with a bundle or with a run in torch, and encode their images."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbedge.api import ReportGenerator
from cbedge.drafting.query import read_images
from cbedge.errors import DraftError
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.prompt import ClinicalContext
from cbedge.report import MARK, Report
from training.base import ModelAndTokenizers
from training.run_bundle import ReportResources, open_run

MAX_NEW_TOKENS = 160
REMEMBERED = 2000  # 0.4 MB each, mini
NO_IMAGE = Radiograph(np.full((8, 8), 0.5, np.float32), "frontal", "no image")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """One draft to write: the frontal radiograph, the context, and the lateral radiograph for a model that reads it."""

    image: Path | Radiograph
    context: ClinicalContext
    lateral: Path | Radiograph | None = None


class Drafter:
    """Drafts reports as users get them, by the pipeline of the runtime.

    Args:
        generator: a bundle, or a run (:func:`training.run_bundle.open_run`).
    """

    def __init__(self, generator: ReportGenerator, name: str):
        self.generator, self.name, self.decoding = generator, name, generator.decoding

    def freely(self) -> "Drafter":
        """The same model, writing without a template."""
        other = copy.copy(self)
        other.decoding = replace(self.decoding, keep_to_template=False)
        return other

    def templates(self, requests: list[Request]) -> list[str] | None:
        """The template of each study, chosen by its context alone; ``None`` for a model without templates."""
        templates = self.generator.resources.templates
        if templates is None:
            return None
        return [templates.choose(request.context) for request in requests]

    def draft(self, requests: list[Request], progress: Progress) -> list[str]:
        """The text of each draft, without marks; empty if there is none, as users get none."""
        return [report.text.replace(MARK, "") if report else "" for report in self.reports(requests, progress)]

    def reports(self, requests: list[Request], progress: Progress) -> list[Report | None]:
        """Each draft; ``None`` if the model writes no whole report."""
        reports: list[Report | None] = []
        for request in requests:
            c = request.context
            try:
                report = self.generator.generate(
                    request.image,
                    indication=c.indication,
                    comparison=c.comparison,
                    view=c.view,
                    lateral=request.lateral if self.generator.reads_lateral else None,
                    max_new_tokens=MAX_NEW_TOKENS,
                    accept_any_image=True,
                    decoding=self.decoding,
                )
                reports.append(report)
            except DraftError:
                reports.append(None)
            progress(1)
        return reports


class RuntimeDrafter(Drafter):
    """Drafts of a bundle.

    Args:
        model: folder of a bundle; default is the embedded one.
        variant: a variant of the bundle; default is its default.
    """

    def __init__(self, model: Path | None, variant: str | None, device: str = "cpu"):
        generator = ReportGenerator.from_pretrained(model, variant, device)
        backend: Any = generator.backend
        backend.encode_image = remember(backend.encode_image)
        super().__init__(generator, f"{generator.variant} (cbedge)")


class TorchDrafter(Drafter):
    """Drafts of a run, in torch: letter for letter those of its fp32 bundle.

    Args:
        parts: the trained model, on its device.
        image_blind: the model was trained without images, and no image is read.
        resources: the parts that its bundle would have, see :class:`~training.run_bundle.ReportResources`.
    """

    def __init__(
        self,
        parts: ModelAndTokenizers,
        name: str = "fp32 (torch)",
        image_blind: bool = False,
        resources: ReportResources = ReportResources(),
    ):
        super().__init__(open_run(parts, resources, image_blind), name)
        self.image_blind = image_blind

    def reports(self, requests: list[Request], progress: Progress) -> list[Report | None]:
        """See :class:`Drafter`."""
        if self.image_blind:
            requests = [replace(request, image=NO_IMAGE, lateral=None) for request in requests]
        return super().reports(requests, progress)


def remember(encode: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Cache the features of the first :data:`REMEMBERED` radiographs, because the controls use the same ones again;
    ``encode`` maps pixels float32 [1, 3, S, S] to features float32 [1, P, H]."""
    known: dict[bytes, np.ndarray] = {}

    def encoded(pixels: np.ndarray) -> np.ndarray:
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key in known:
            return known[key]
        features = encode(pixels)
        if len(known) < REMEMBERED:
            known[key] = features
        return features

    return encoded


class Encoder:
    """The image side of a bundle or of a run in torch, for the retrieval controls and the linear probes.

    Args:
        generator: its backend encodes the radiographs one by one.
        batch_size: radiographs whose features are in memory together.
    """

    def __init__(self, generator: ReportGenerator, batch_size: int = 16):
        self.generator, self.batch_size = generator, batch_size

    def encode(self, images: Sequence[Path | Radiograph]) -> torch.Tensor:
        """The vision encoder's features [B, P, H]."""
        settings = self.generator.bundle.manifest.preprocessing
        pixels = (preprocess_radiograph(load_radiograph(image), settings) for image in images)
        return torch.from_numpy(np.concatenate([self.generator.backend.encode_image(p) for p in pixels]))

    def query(self, features: torch.Tensor, contexts: list[ClinicalContext]) -> torch.Tensor:
        """Encoded radiographs [B, P, H] → image embeddings [B, Q, D].

        They are the Q-Former's output after the projection. That is linear and not narrower, so a linear probe finds
        the same in both.
        """
        rows = zip(features.numpy(), contexts, strict=True)
        backend, codec = self.generator.backend, self.generator.resources.codec
        readings = [read_images(backend, codec, None, [f[None]], c) for f, c in rows]
        return torch.from_numpy(np.concatenate([reading.image_embeds for reading in readings]))
