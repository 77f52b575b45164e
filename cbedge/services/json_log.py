"""Logs of the services: JSON lines on standard error, without patient data."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class _Line(logging.Formatter):
    """One JSON object: time in UTC, level, and the message, which is text or has fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "level": record.levelname, "message": record.msg})


def log_to_stderr(logger: logging.Logger, *noisy: str) -> None:
    """Log to standard error, and silence libraries whose messages contain received data."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for library in noisy:
        logging.getLogger(library).setLevel(logging.CRITICAL)
