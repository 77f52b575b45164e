"""Deprecated: moved to :mod:`cbedge.drafting.templates`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.drafting.templates")
