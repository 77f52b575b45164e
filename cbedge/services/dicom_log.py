"""Log of the DICOM node: JSON lines on standard error, without patient data."""

from __future__ import annotations

import json
import logging
import sys
import threading

from cbedge.images.dicom_file import silence_pydicom

_log = logging.getLogger("cbedge.listen")


def log(text: str) -> None:
    """Log a message; it must not contain header values."""
    _log.info(json.dumps(text))


def log_to_stderr() -> None:
    """Log to standard error, and stop libraries from printing received data."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "message": %(message)s}'))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    silence_pydicom()
    threading.excepthook = lambda ended: log(f"a connection ended with an error: {ended.exc_type.__name__}")
