"""How much memory a radiograph may take to be read: estimated from its header, before anything is decoded.

A file of a few kilobytes can announce gigabytes of pixels. Each reader adds up what its decoder and its arrays will
need at once; more than :data:`MAX_WORKING_BYTES` is refused, and radiographs that are read at the same time in several
threads wait for each other where they would need more together.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO

from cbedge.errors import RadiographError

MAX_PIXELS = 64_000_000  # the largest digitizers and detectors give some 30 million
MAX_BYTES = 2 * MAX_PIXELS + 16 * 2**20  # of a file: so many pixels of 16 bits, and a header
LARGE_FILE_BYTES = 8 * 2**20
MAX_WORKING_BYTES = 500_000_000  # while a radiograph is read, its file's bytes among them
MAX_KEPT_BYTES = 144_000_000  # of a radiograph that has been read: 36 megapixels in grey


class PartedFile:
    """A binary file that is read in parts, not too many: a file of nothing but tiny parts needs a hundred times its
    size in objects.

    Args:
        file: to be read and sought in.
        name: what to call it in a message.
        most: parts that are read.
    """

    def __init__(self, file: IO[bytes], name: str, most: int):
        self._file, self._name, self._left = file, name, iter(range(most))
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As of a file.

        Raises:
            RadiographError: it was called too often.
        """
        if next(self._left, None) is None:
            raise RadiographError(f"{self._name} consists of too many parts to be a radiograph: export it again")
        return self._file.read(size)

    def within(self, content: bytes) -> PartedFile:
        """A part of the same file by itself, whose own parts count as well."""
        inner = PartedFile(io.BytesIO(content), self._name, 0)
        inner._left = self._left
        return inner


class _Pool:
    """Bytes that threads take and give back."""

    def __init__(self, size: int):
        self._size, self._taken, self._changed = size, 0, threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._taken + count <= self._size)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_pool = _Pool(MAX_WORKING_BYTES)
_large_file = threading.Lock()


@contextmanager
def file_memory(size: int) -> Iterator[None]:
    """Read one large file at a time: the block, in which it is read and decoded, waits until no other one is."""
    with _large_file if size > LARGE_FILE_BYTES else nullcontext():
        yield


@contextmanager
def working_memory(needed: int, name: str, size: tuple[int, int]) -> Iterator[None]:
    """Hold so many bytes of memory free for the block; wait while other threads hold too many.

    Args:
        needed: bytes, an estimate.
        name: what to call the radiograph in a message.
        size: its columns and rows.

    Raises:
        RadiographError: it is more than a radiograph may take.
    """
    if needed > MAX_WORKING_BYTES:
        raise RadiographError(
            f"{name} has {size[0]:,} x {size[1]:,} pixels, which take {needed // 10**6:,} MB of memory to be read; at "
            f"most {MAX_WORKING_BYTES // 10**6} MB are used: scale it down"
        )
    with _pool.taken(needed):
        yield


def reduction(rows: int, columns: int, bytes_per_pixel: int) -> int:
    """Over how many rows and columns pixels are averaged, so that they take :data:`MAX_KEPT_BYTES` at most: 1 for all
    but the largest films."""
    factor = 1
    while -(-rows // factor) * -(-columns // factor) * bytes_per_pixel > MAX_KEPT_BYTES:
        factor += 1
    return factor


def kept_bytes(rows: int, columns: int, bytes_per_pixel: int = 4) -> int:
    """What is kept of a radiograph of this size."""
    factor = reduction(rows, columns, bytes_per_pixel)
    return -(-rows // factor) * -(-columns // factor) * bytes_per_pixel
