"""Batch processing, the HTTP service and the DICOM node."""
