"""Deprecated: moved to :mod:`cbedge.services.batch`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.services.batch")
