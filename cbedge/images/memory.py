"""Limit the memory for reading a radiograph, estimated from its header before decoding.

A file of a few kilobytes can declare gigabytes of pixels. Each reader estimates the peak memory of its decoder and
arrays. More than :data:`MAX_WORKING_BYTES` is refused; threads that read at the same time wait if they would need more
together.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO

from cbedge.errors import RadiographError

MAX_PIXELS = 64_000_000  # the largest digitizers and detectors have about 30 million
MAX_BYTES = 2 * MAX_PIXELS + 16 * 2**20  # of a file: 16-bit pixels and a header
LARGE_FILE_BYTES = 8 * 2**20
MAX_WORKING_BYTES = 500_000_000  # peak while reading a radiograph, file content included
MAX_KEPT_BYTES = 144_000_000  # of a radiograph after reading: 36 megapixels in grey


class PartedFile:
    """A seekable binary file with a limited number of read calls. A file that consists of tiny parts would need a
    hundred times its size in objects."""

    def __init__(self, file: IO[bytes], name: str, most: int):
        self._file, self._name, self._left = file, name, iter(range(most))
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read like a file.

        Raises:
            RadiographError: there were too many read calls.
        """
        if next(self._left, None) is None:
            raise RadiographError(f"{self._name} consists of too many parts to be a radiograph: export it again")
        return self._file.read(size)

    def within(self, content: bytes) -> PartedFile:
        """A part of the same file as a file of its own; its read calls count as well."""
        inner = PartedFile(io.BytesIO(content), self._name, 0)
        inner._left = self._left
        return inner


_large_file = threading.Lock()
_reservations: list[int] = []
_changed = threading.Condition()  # of the reservations


def file_memory(size: int) -> AbstractContextManager[object]:
    """Serialize the reading and decoding of large files; small files do not wait."""
    return _large_file if size > LARGE_FILE_BYTES else nullcontext()


@contextmanager
def working_memory(needed: int, name: str, size: tuple[int, int]) -> Iterator[None]:
    """Reserve memory for the block; wait while other threads have reserved too much.

    Raises:
        RadiographError: the ``needed`` bytes exceed :data:`MAX_WORKING_BYTES`; the message has name and size (columns
            and rows) of the image.
    """
    if needed > MAX_WORKING_BYTES:
        raise RadiographError(
            f"{name} has {size[0]:,} x {size[1]:,} pixels and needs {needed // 10**6:,} MB of memory to read; the "
            f"limit is {MAX_WORKING_BYTES // 10**6} MB: scale it down"
        )
    with _changed:
        _changed.wait_for(lambda: sum(_reservations) + needed <= MAX_WORKING_BYTES)
        _reservations.append(needed)
    try:
        yield
    finally:
        with _changed:
            _reservations.remove(needed)
            _changed.notify_all()


def reduction(rows: int, columns: int, bytes_per_pixel: int) -> int:
    """The factor by which an image is reduced so that it needs at most :data:`MAX_KEPT_BYTES`; 1 for all but the
    largest images."""
    factor = 1
    while -(-rows // factor) * -(-columns // factor) * bytes_per_pixel > MAX_KEPT_BYTES:
        factor += 1
    return factor


def kept_bytes(rows: int, columns: int, bytes_per_pixel: int = 4) -> int:
    """Bytes of a radiograph of this size after reading."""
    factor = reduction(rows, columns, bytes_per_pixel)
    return -(-rows // factor) * -(-columns // factor) * bytes_per_pixel
