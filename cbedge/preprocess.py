"""Deprecated: moved to :mod:`cbedge.images.preprocess`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.images.preprocess")
