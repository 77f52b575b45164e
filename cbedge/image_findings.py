"""Deprecated: moved to :mod:`cbedge.findings.image_findings`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.findings.image_findings")
