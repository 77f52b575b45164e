"""Deprecated: moved to :mod:`cbedge.services.batch` and :mod:`cbedge.services.studies`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.services.batch", "cbedge.services.studies")
