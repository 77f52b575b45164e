"""Errors that cbedge raises. Each message says what is wrong, with what, and what to do."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY_WORDS = re.compile(
    "bad.alloc|allocate memory|out of memory|failed to map segment|can't start new thread", re.IGNORECASE
)


def install_extra(extra: str) -> str:
    """What to type to install an extra such as ``serve``: in a clone, or from a folder of wheels."""
    return (
        f'pip install -c constraints.txt ".[{extra}]" in the clone, or from a folder of wheels: '
        f'pip install --no-index --find-links FOLDER "cbedge[{extra}]"'
    )


class CbedgeError(Exception):
    """Base class of every expected failure. ``exit_code`` is the exit code of the command line."""

    exit_code = 1


class RadiographError(CbedgeError):
    """The given file or array cannot be used as a radiograph."""

    exit_code = 3


class ContextError(CbedgeError):
    """The indication, comparison, view or template cannot be used."""

    exit_code = 4


class OptionError(ContextError):
    """An option, an argument or a setting has a value that it cannot have, or two of them cannot be combined."""

    exit_code = 2


class BundleError(CbedgeError):
    """A model bundle is missing, incomplete, altered, or of an unknown format or variant."""

    exit_code = 5


class DeviceError(CbedgeError):
    """The device is unknown or not available, ONNX Runtime is not installed correctly, or memory ran out."""

    exit_code = 6


class OutputError(CbedgeError):
    """A result cannot be written to the requested place."""

    exit_code = 7


class DraftError(CbedgeError):
    """The finished draft fails its last check: it is not a complete report and is not returned."""

    exit_code = 8


@contextmanager
def memory_errors() -> Iterator[None]:
    """Convert whatever an exhausted memory raises to one message.

    Raises:
        DeviceError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        reason = "not enough memory for this radiograph and model: close other programs or scale the radiograph down"
        raise DeviceError(reason) from error


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that memory ran out.

    Python, the operating system, the loader of libraries and ONNX Runtime each say so in their own way.
    """
    while error is not None:
        words = "" if isinstance(error, CbedgeError) else str(error)  # theirs may hold the name of a file
        is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if isinstance(error, MemoryError) or is_system or _MEMORY_WORDS.search(words):
            return True
        error = error.__cause__ or error.__context__
    return False
