"""Deprecated: moved to :mod:`cbedge.images.heatmap`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.images.heatmap")
