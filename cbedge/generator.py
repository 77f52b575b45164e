"""Deprecated: moved to :mod:`cbedge.api`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.api")
