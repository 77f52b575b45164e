"""Deprecated: moved to :mod:`cbedge.drafting.templates` and :mod:`cbedge.drafting.template_parser`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.drafting.templates", "cbedge.drafting.template_parser")
