"""Batches, the HTTP service and the DICOM node."""
