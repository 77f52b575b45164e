"""Deprecated: moved to :mod:`cbedge.services.http`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.services.http", "cbedge.services.http_queue")
