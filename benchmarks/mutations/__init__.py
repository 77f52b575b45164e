"""The inputs of :mod:`benchmarks.robustness`: well-formed films in other containers, and damaged files and requests.

Input ``i`` of a seed is the same on every machine with the same versions of NumPy, Pillow and pydicom. All are made
from the repository's example radiograph.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.mutations.base import FILMS, MARKER, Input, film
from benchmarks.mutations.dicoms import dicom, dicom_bytes, dicom_lies, dicom_patient, dicom_pixels
from benchmarks.mutations.rasters import jpeg, png, raster, raster_bytes, tiff
from benchmarks.mutations.words import http, pdu, table, text


def plan(seed: int, index: int, only: str | None = None) -> tuple[str, str]:
    """The kind and the route of an input."""
    rng = np.random.default_rng([seed, index, 0])
    names = list(KINDS)
    weights = np.array([KINDS[name].weight for name in names], float)
    kind = only or str(rng.choice(names, p=weights / weights.sum()))
    routes = KINDS[kind].routes
    return kind, str(np.random.default_rng([seed, index, 2]).choice(list(routes), p=[*routes.values()]))


def make_input(seed: int, index: int, only: str | None = None) -> Input:
    """Input ``index`` of a seed; ``only`` restricts the inputs to one kind."""
    kind, route = plan(seed, index, only)
    made = Input(index, kind, route)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind].make(np.random.default_rng([seed, index, 1]), made)
    return made


def _equivalent(rng: np.random.Generator, made: Input) -> None:
    made.film = int(rng.integers(FILMS))
    makers: list[Callable[[np.random.Generator, Input, np.ndarray], None]] = [raster, raster, dicom, dicom, dicom]
    if made.route == "api":
        makers.append(_array)
    if made.route == "listen":
        makers = [dicom]
    makers[rng.integers(len(makers))](rng, made, film(made.film))


def _array(rng: np.random.Generator, made: Input, grey: np.ndarray) -> None:
    kind = str(rng.choice(["u1", "u2", "f4", "f8", "f2", "rgb", "rgba", "big", "fortran", "strided"]))
    made.note = f"array {kind}"
    eight, sixteen = np.round(grey * 255).astype(np.uint8), np.round(grey * 65535).astype(np.uint16)
    made.may_refuse = kind == "big"
    arrays: dict[str, np.ndarray] = {
        "u1": eight,
        "u2": sixteen,
        "f4": grey.astype(np.float32),
        "f8": grey,
        "f2": grey.astype(np.float16),
        "rgb": np.repeat(eight[..., None], 3, 2),
        "rgba": np.dstack([eight] * 3 + [np.full_like(eight, 255)]),
        "big": sixteen.astype(">u2"),
        "fortran": np.asfortranarray(eight),
        "strided": np.repeat(eight, 2, 1)[:, ::2],
    }
    made.array = arrays[kind]


@dataclass(frozen=True)
class Kind:
    """Weight of a kind of input, the shares of its routes, and the function that makes it."""

    weight: float
    routes: dict[str, float]
    make: Callable[[np.random.Generator, Input], None]


_FILES = {"api": 0.45, "generate": 0.2, "batch": 0.1, "serve": 0.15, "listen": 0.1}
_FILM = {"api": 0.55, "generate": 0.2, "batch": 0.1, "serve": 0.15}
KINDS: dict[str, Kind] = {
    "equivalent": Kind(25, {"api": 0.6, "generate": 0.15, "batch": 0.1, "serve": 0.15}, _equivalent),
    "png": Kind(8, _FILM, png),
    "jpeg": Kind(8, _FILM, jpeg),
    "tiff": Kind(8, _FILM, tiff),
    "raster-bytes": Kind(10, _FILM, raster_bytes),
    "dicom-bytes": Kind(10, _FILES, dicom_bytes),
    "dicom-pixels": Kind(10, _FILES, dicom_pixels),
    "dicom-header": Kind(8, {"api": 0.2, "generate": 0.3, "serve": 0.2, "listen": 0.3}, dicom_patient),
    "dicom-sizes": Kind(2, _FILES, dicom_lies),
    "text": Kind(4, {"api": 0.3, "generate": 0.4, "serve": 0.3}, text),
    "table": Kind(4, {"batch": 1.0}, table),
    "http": Kind(4, {"serve": 1.0}, http),
    "pdu": Kind(1, {"listen": 1.0}, pdu),
}


def describe(made: Input) -> str:
    """What was changed, in one line, without the marker."""
    options = {k: v for k, v in made.options.items() if isinstance(v, str)}
    return f"{made.route} {made.note} {json.dumps(options) if options else ''}".strip().replace(MARKER, "NAME")
