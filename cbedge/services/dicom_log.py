"""What the DICOM node logs: JSON lines on standard error, without patient data."""

from __future__ import annotations

import json
import logging
import sys
import threading

from cbedge.images.dicom_file import silence_pydicom

_log = logging.getLogger("cbedge.listen")


def tell(text: str) -> None:
    """Log a sentence; it may hold nothing of a header."""
    _log.info(json.dumps(text))


def log_to_stderr() -> None:
    """Log to standard error, and keep libraries from printing what they are sent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "message": %(message)s}'))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    silence_pydicom()
    threading.excepthook = lambda ended: tell(f"a connection was ended by an error: {ended.exc_type.__name__}")
