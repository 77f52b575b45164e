"""Deprecated: moved to :mod:`cbedge.images.radiograph`."""

import warnings
from typing import Any

import numpy as np

from cbedge._moved import forward

_moved = forward(__name__, "cbedge.images.radiograph")
_SETTINGS = {"IMAGE_SIZE": "image_size", "IMAGE_MEAN": "mean", "IMAGE_STD": "std"}


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Deprecated: :func:`cbedge.images.preprocess.preprocess` with the default settings; float32 [1, 3, 224, 224]."""
    from cbedge.images.preprocess import Preprocessing, preprocess

    warnings.warn("use cbedge.images.preprocess.preprocess with a model's settings", DeprecationWarning, stacklevel=2)
    return preprocess(pixels, Preprocessing())


def __getattr__(name: str) -> Any:
    if name not in _SETTINGS:
        return _moved(name)
    from cbedge.images.preprocess import Preprocessing

    warnings.warn(f"{name} is deprecated: use the model's Manifest.preprocessing", DeprecationWarning, stacklevel=2)
    return getattr(Preprocessing(), _SETTINGS[name])
