"""Check that the images of a study are chest radiographs of the right view, upright, not mirrored, and like those of
training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbedge.errors import RadiographError
from cbedge.images.familiarity import FAMILIARITY, LIMIT, Familiarity
from cbedge.images.gate import GATE, Gate
from cbedge.images.radiograph import Radiograph


@dataclass(frozen=True)
class FilmAssessment:
    """What was found about the images of a study.

    Attributes:
        warnings: one sentence each.
        unfamiliarity: how unlike the radiographs of training the least familiar image is
            (:meth:`cbedge.images.familiarity.Familiarity.unfamiliarity`); ``None`` if the bundle has no such measure.
    """

    warnings: tuple[str, ...] = ()
    unfamiliarity: float | None = None

    @property
    def familiar(self) -> bool:
        """Whether figures that were measured on radiographs like those of training hold for the study."""
        return self.unfamiliarity is None or self.unfamiliarity <= LIMIT


@dataclass(frozen=True)
class FilmCheck:
    """A bundle's checks of input images.

    Attributes:
        gate: tells upright chest radiographs and their views from other images; ``None`` if the bundle has none.
        familiarity: measures how unlike the radiographs of training they are; ``None`` if the bundle has none.
        reads_lateral: whether the model reads a lateral radiograph together with the frontal one.
    """

    gate: Gate | None
    familiarity: Familiarity | None
    reads_lateral: bool

    @classmethod
    def load(cls, folder: Path, files: Collection[str], reads_lateral: bool) -> FilmCheck:
        """Load the checks in a bundle's folder, of those that are among its files.

        Raises:
            BundleError: a file cannot be read.
        """
        return cls(
            Gate.load(folder / GATE) if GATE in files else None,
            Familiarity.load(folder / FAMILIARITY) if FAMILIARITY in files else None,
            reads_lateral,
        )

    def assess(
        self,
        films: Sequence[Radiograph],
        features: Sequence[np.ndarray],
        view: str | None,
        accept_any_image: bool = False,
    ) -> FilmAssessment:
        """Refuse images that are not upright chest radiographs of their view, and warn about doubtful ones.

        Args:
            films: radiographs of the study, the frontal one first.
            features: vision features of each, float32 [1, P, H].
            view: view of the first one.
            accept_any_image: refuse no image.

        Raises:
            NotAChestRadiograph: an image does not look like an upright chest radiograph.
            RadiographError: a frontal radiograph looks like a lateral one.
        """
        views = ["lateral" if view == "lateral" else "frontal", "lateral"]
        warnings: list[str] = []
        distances: list[float] = []
        for film, given, found in zip(films, views, features, strict=False):
            if self.gate is not None:
                warnings += self._check(self.gate, film, found, given, accept_any_image)
            if self.familiarity is not None:
                distances.append(self.familiarity.unfamiliarity(found, given))
        unfamiliarity = max(distances, default=None)
        if unfamiliarity is not None and unfamiliarity > LIMIT:
            warnings.append(
                f"The radiograph is unlike those of training (unfamiliarity {unfamiliarity:.1f}, limit {LIMIT:.0f}): "
                "the measured quality of the model need not hold."
            )
        return FilmAssessment(tuple(dict.fromkeys(warnings)), unfamiliarity)

    def _check(
        self, gate: Gate, film: Radiograph, features: np.ndarray, given: str, accept_any_image: bool
    ) -> list[str]:
        """Warnings about one image."""
        logits = gate.logits(features)
        if not accept_any_image:
            gate.check(logits, film.chroma)
        elif reason := gate.reason(logits, film.chroma):
            return [f"Accepted on request, though {reason}."]
        looks_lateral = gate.is_lateral(logits)
        if looks_lateral and given == "frontal" and not accept_any_image:
            remedy = "give it as --lateral together with the frontal view, or alone with --view lateral"
            remedy = remedy if self.reads_lateral else "give the frontal view, or add --view lateral"
            raise RadiographError(f"the radiograph looks like a lateral view: {remedy}")
        if looks_lateral and given == "frontal":
            return ["The radiograph given as frontal looks like a lateral view: check the view."]
        if given == "lateral" and not looks_lateral:
            return ["The radiograph given as lateral looks like a frontal view: check the view."]
        if given == "frontal" and gate.is_mirrored(logits):
            return ["The radiograph looks mirrored (left and right swapped): check its side marker."]
        return []
