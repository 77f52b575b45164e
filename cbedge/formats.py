"""Deprecated: moved to :mod:`cbedge.outputs`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.outputs")
