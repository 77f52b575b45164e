"""Deprecated: moved to :mod:`cbedge.bundles.bundle`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.bundles.bundle")
