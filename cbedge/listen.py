"""Deprecated: moved to :mod:`cbedge.services.dicom_node`."""

from cbedge._moved import forward

__getattr__ = forward(__name__, "cbedge.services.dicom_node")
