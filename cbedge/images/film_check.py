"""See that a study's radiographs look like what they are given as: chest films, of the right view, not mirrored."""

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
    """What a bundle brings to check radiographs.

    Attributes:
        gate, lateral_gate: know chest films of each view; ``None`` where the bundle has none.
        film_view: tells lateral and mirrored films; ``None`` likewise.
        reads_lateral: the model reads a lateral radiograph beside the frontal one.
    """

    gate: Gate | None
    lateral_gate: Gate | None
    film_view: FilmView | None
    reads_lateral: bool

    @classmethod
    def load(cls, folder: Path, files: Collection[str], reads_lateral: bool) -> FilmCheck:
        """Read the files of a bundle.

        Args:
            folder: of the bundle.
            files: names of those that it has.
            reads_lateral: see above.

        Raises:
            BundleError: one cannot be read.
        """
        return cls(
            Gate.load(folder / GATE) if GATE in files else None,
            Gate.load(folder / LATERAL_GATE) if LATERAL_GATE in files else None,
            FilmView.load(folder / FILM_VIEW) if FILM_VIEW in files else None,
            reads_lateral,
        )

    def assess(
        self, films: Sequence[Radiograph], features: Sequence[np.ndarray], view: str | None,
        accept_any_image: bool = False,
    ) -> tuple[str, ...]:  # fmt: skip
        """Refuse what is no chest film of its view, and warn of what looks doubtful.

        Args:
            films: the study's, its frontal one first.
            features: of each, by the vision encoder, float32 [1, P, H].
            view: of the first one.
            accept_any_image: refuse nothing.

        Returns:
            Warnings, a sentence each.

        Raises:
            RadiographError: one looks like no chest radiograph, or like a lateral one that is given as frontal.
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
                warnings.append("The radiograph looks mirrored, left and right exchanged: check its side marker.")
        return tuple(warnings)

    def _refuse(self, film: Radiograph, features: np.ndarray, view: str, looks_lateral: bool) -> None:
        gate = (self.lateral_gate or self.gate) if looks_lateral or view == "lateral" else self.gate
        if gate is not None:
            try:
                gate.check(features, film.chroma)
            except NotAChestRadiograph:
                if view != "lateral" or self.gate is None or gate is self.gate:
                    raise
                self.gate.check(features, film.chroma)  # a frontal film that is given as lateral
        if looks_lateral and view == "frontal":
            beside = "give it as --lateral beside the frontal one, or alone with --view lateral"
            beside = beside if self.reads_lateral else "give the frontal one, or --view lateral"
            raise RadiographError(f"the radiograph looks like a lateral view: {beside}")
