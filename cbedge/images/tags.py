"""Check the tags of TIFF and JPEG files before Pillow reads them, and find the radiograph among the pages of a TIFF."""

from __future__ import annotations

import struct
from contextlib import suppress

from cbedge.errors import RadiographError

MAX_FRAMES = 100  # counting stops here
_MAX_EXIF_PARTS = 16  # parts of 64 KB in a JPEG
_MAX_TAG_BYTES = 2**22  # of numeric tags; Pillow creates an object for each number
_TAG_BYTES = {3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # by type of tag
_FURTHER_TAGS = (34665, 34853, 40965)  # of sub-directories
_KIND_OF_PAGE, _NO_FILM = 254, 1 | 4  # tag and bits: a reduced copy, a mask


def check_tags(data: bytes, name: str) -> tuple[int, int]:
    """Check that a file's tags are not too large for Pillow, and read the kinds of a TIFF's pages without the pages.

    Returns:
        number of full pages, 0 if it is not a TIFF; index of the first full page, after thumbnails.
    """
    if data[:2] == b"\xff\xd8" and data.count(b"Exif\0\0") > _MAX_EXIF_PARTS:
        raise RadiographError(f"{name} has too many parts of EXIF data: export it again")
    if data[:2] not in (b"II", b"MM"):
        return 0, 0
    pages: list[bool] = []
    further: list[int] = []
    size = 0
    with suppress(struct.error):  # Pillow refuses damaged files
        following = _first_directory(data)
        seen: set[int] = set()
        while following and following not in seen and len(pages) < MAX_FRAMES:
            seen.add(following)
            found, following, inner, is_full = _read_directory(data, following)
            if True not in pages:  # Pillow reads those up to the first full page
                size, further = size + found, further + inner
            pages.append(is_full)
        while further and len(seen) < 2 * MAX_FRAMES:
            seen.add(len(seen))
            found, _, inner, _ = _read_directory(data, further.pop())
            size, further = size + found, further + inner
    if size > _MAX_TAG_BYTES:
        raise RadiographError(
            f"{name} has {size:,} bytes of numbers in its tags; the limit is {_MAX_TAG_BYTES:,}: export it again"
        )
    return (sum(pages), pages.index(True)) if True in pages else (max(len(pages), 1), 0)


def _first_directory(data: bytes) -> int:
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"\x2b"
    return int(struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)[0])


def _read_directory(data: bytes, at: int) -> tuple[int, int, list[int], bool]:
    """Read a TIFF directory: size of its numbers in bytes, offset of the next directory, offsets of sub-directories;
    whether it is a page of its own, no thumbnail or mask."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:3] == b"\x2b"
    entry = struct.Struct(order + ("HHQQ" if big else "HHLL"))
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at, size = at + (8 if big else 2), 0
    further, is_full = [], True
    if count > 2**16:
        raise struct.error
    for _ in range(count):
        tag, kind, values, value = entry.unpack_from(data, at)
        size += values * _TAG_BYTES.get(kind, 0)
        further += [value] if tag in _FURTHER_TAGS else []
        if tag == _KIND_OF_PAGE:
            unused = max(0, (8 if big else 4) - _TAG_BYTES.get(kind, 4))  # bytes behind the number
            is_full = not (value >> 8 * unused if order == ">" else value) & _NO_FILM
        at += entry.size
    return size, int(struct.unpack_from(order + ("Q" if big else "L"), data, at)[0]), further, is_full
