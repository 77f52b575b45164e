"""Deprecated: moved to :mod:`cbedge.bundles.bundle` and :mod:`cbedge.bundles.manifest`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.bundles.manifest", "cbedge.bundles.bundle")
