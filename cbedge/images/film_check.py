"""Check that the images of a study look like chest radiographs, of the right view, and not mirrored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbedge.errors import RadiographError
from cbedge.images.film_view import FILM_VIEW, FilmView
from cbedge.images.gate import GATE, LATERAL_GATE, Gate, NotAChestRadiograph
from cbedge.images.radiograph import Radiograph


@dataclass(frozen=True)
class FilmCheck:
    """A bundle's classifiers that check input images.

    Attributes:
        gate, lateral_gate: out-of-distribution detectors for each view; ``None`` if the bundle has none.
        film_view: classifier of lateral and mirrored radiographs; ``None`` if the bundle has none.
        reads_lateral: whether the model reads a lateral radiograph together with the frontal one.
    """

    gate: Gate | None
    lateral_gate: Gate | None
    film_view: FilmView | None
    reads_lateral: bool

    @classmethod
    def load(cls, folder: Path, files: Collection[str], reads_lateral: bool) -> FilmCheck:
        """Load the classifiers in a bundle's folder, of those that are among its files.

        Raises:
            BundleError: a file cannot be read.
        """
        return cls(
            Gate.load(folder / GATE) if GATE in files else None,
            Gate.load(folder / LATERAL_GATE) if LATERAL_GATE in files else None,
            FilmView.load(folder / FILM_VIEW) if FILM_VIEW in files else None,
            reads_lateral,
        )

    def assess(
        self,
        films: Sequence[Radiograph],
        features: Sequence[np.ndarray],
        view: str | None,
        accept_any_image: bool = False,
    ) -> tuple[str, ...]:
        """Refuse images that do not look like chest radiographs of their view, and warn about doubtful ones.

        Args:
            films: radiographs of the study, the frontal one first.
            features: vision features of each, float32 [1, P, H].
            view: view of the first one.
            accept_any_image: refuse no image.

        Returns:
            Warnings, one sentence each.

        Raises:
            RadiographError: an image does not look like a chest radiograph, or a frontal one looks like a lateral one.
        """
        views = ["lateral" if view == "lateral" else "frontal", "lateral"]
        warnings: list[str] = []
        for film, given, found in zip(films, views, features, strict=False):
            looks_lateral = self.film_view is not None and self.film_view.is_lateral(found)
            if not accept_any_image:
                self._refuse(film, found, given, looks_lateral)
            if looks_lateral and given == "frontal":
                warnings.append("The radiograph given as frontal looks like a lateral view: check the view.")
            elif given == "lateral" and self.film_view is not None and not looks_lateral:
                warnings.append("The radiograph given as lateral looks like a frontal view: check the view.")
            elif given == "frontal" and self.film_view is not None and self.film_view.is_mirrored(found):
                warnings.append("The radiograph looks mirrored (left and right swapped): check its side marker.")
        return tuple(warnings)

    def _refuse(self, film: Radiograph, features: np.ndarray, view: str, looks_lateral: bool) -> None:
        gate = (self.lateral_gate or self.gate) if looks_lateral or view == "lateral" else self.gate
        if gate is not None:
            try:
                gate.check(features, film.chroma)
            except NotAChestRadiograph:
                if view != "lateral" or self.gate is None or gate is self.gate:
                    raise
                self.gate.check(features, film.chroma)  # it may be a frontal view, given as lateral
        if looks_lateral and view == "frontal":
            remedy = "give it as --lateral together with the frontal view, or alone with --view lateral"
            remedy = remedy if self.reads_lateral else "give the frontal view, or add --view lateral"
            raise RadiographError(f"the radiograph looks like a lateral view: {remedy}")
