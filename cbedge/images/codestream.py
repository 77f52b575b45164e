"""Check compressed pixels before decoding: size, components and structure that a codestream declares.

Decoders allocate the size that a codestream declares, whatever the file's header says, and skip data that they do not
understand. So a codestream is parsed here marker by marker according to the standards (JPEG: T.81 annex B, JPEG-LS:
T.87 annex C, JPEG 2000: T.800 annex A); one that does not conform is not decoded.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

_SOS, _APP11 = 0xDA, 0xEB
_JPEG_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7)
_JPEG_TABLES = (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xF8, 0xFE)  # allowed before the first scan
_J2K_START = b"\xff\x4f\xff\x51"
_J2K_CODING, _J2K_PART, _J2K_DATA, _J2K_END = (0x52, 0x53), 0x90, 0x93, 0xD9
_J2K_MARKERS = (0x50, 0x52, 0x53, 0x55, *range(0x57, 0x5A), *range(0x5C, 0x62), 0x63, 0x64, 0x74, 0x75, 0x77, 0x78)
_RUN_PADDING = 1024  # bytes by which an unpacked segment may exceed the pixels
_BLOCK_BYTES, _TILE_BYTES = 600, 12_000  # upper bounds of what OpenJPEG 2.5 allocates for each


class CodestreamError(ValueError):
    """Compressed pixels are not a valid codestream."""


@dataclass(frozen=True)
class Codestream:
    """Properties that a codestream declares.

    Attributes:
        rows, columns: size of the image.
        components: components per pixel.
        bits: largest bit depth of a component.
        overhead: additional bytes for code blocks and tiles.
        is_signed: whether a component is signed.
    """

    rows: int
    columns: int
    components: int
    bits: int
    overhead: int = 0
    is_signed: bool = False


def read_jpeg(data: bytes) -> Codestream:
    """Read the frame header of a JPEG or JPEG-LS codestream.

    Raises:
        CodestreamError: it is invalid, has unexpected markers before its first scan, or several frames.
    """
    if data[:2] != b"\xff\xd8":
        raise CodestreamError("no start of image")
    at, found = 2, None
    while True:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(data) < at + 4 or data[at] != 0xFF:
            raise CodestreamError("missing marker")
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _JPEG_FRAMES and found is None and length >= 8 and len(data) >= at + 10:
            bits, components = data[at + 4], data[at + 9]
            rows, columns = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            found = Codestream(rows, columns, components, bits)
        elif marker == _SOS and found is not None:
            return found
        elif marker not in _JPEG_TABLES or length < 2 or (marker == _APP11 and data[at + 4 : at + 6] == b"JP"):
            # JPEG XT has additional images in APP11 segments.
            raise CodestreamError("unexpected marker")
        at += 2 + length


def read_jpeg2000(data: bytes) -> Codestream:
    """Read the main header and the tile-part headers of a JPEG 2000 codestream, bare or in a JP2 file.

    Raises:
        CodestreamError: it is invalid.
    """
    at = 0 if data[:4] == _J2K_START else _jp2_codestream(data)
    if data[at : at + 4] != _J2K_START or len(data) < at + 44:
        raise CodestreamError("no start of codestream")
    right, bottom, left, top, tile_columns, tile_rows = (
        int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(6)
    )
    components = int.from_bytes(data[at + 40 : at + 42], "big")
    rows, columns = bottom - top, right - left
    depths = data[at + 42 : at + 42 + 3 * components : 3]
    if min(rows, columns, components, tile_rows, tile_columns) < 1 or len(depths) < components:
        raise CodestreamError("no size")
    block = _smallest_block(data, at + 4 + int.from_bytes(data[at + 4 : at + 6], "big"))
    tiles = -(-right // tile_columns) * -(-bottom // tile_rows)
    overhead = components * rows * columns * _BLOCK_BYTES // block + tiles * components * _TILE_BYTES
    bits = max(depth & 0x7F for depth in depths) + 1
    return Codestream(rows, columns, components, bits, overhead, any(depth & 0x80 for depth in depths))


def _jp2_codestream(data: bytes) -> int:
    """Offset of the first codestream in a JP2 file."""
    at = 0
    if data[4:12] != b"jP  \r\n\x87\n":
        raise CodestreamError("not a JP2 file")
    while len(data) >= at + 8:
        length, kind, header = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind == b"jp2c":
            return at + header
        if length < header:
            break
        at += length
    raise CodestreamError("no codestream in the JP2 file")


def _smallest_block(data: bytes, at: int) -> int:
    """Pixels of the smallest code block of all coding styles."""
    smallest, part, most = 2**24, 0, len(data)
    while at + 4 <= most:
        if data[at] != 0xFF:
            raise CodestreamError("missing marker")
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _J2K_END:
            break
        if marker == _J2K_DATA and part:
            if not (size := int.from_bytes(data[part + 6 : part + 10], "big")):
                break  # the last tile-part, up to the end
            if part + size < at + 2:
                raise CodestreamError("a tile-part shorter than its header")
            at, part = part + size, 0
            continue
        if marker == _J2K_PART and not part and length == 10:
            part = at
        elif marker not in _J2K_MARKERS or length < 2:
            raise CodestreamError("unexpected marker")
        elif marker in _J2K_CODING:
            style = data[at + 4 : at + 2 + length]
            flags, rest = (style[:1], style[5:]) if marker == _J2K_CODING[0] else (style[1:2], style[2:])
            smallest = min(smallest, _block_of(flags, rest))
        at += 2 + length
    return smallest


def _block_of(flags: bytes, style: bytes) -> int:
    """Pixels of the smallest code block of a coding style; precincts can reduce the declared block size."""
    if not flags or len(style) < 5:
        raise CodestreamError("a truncated coding style")
    across, down = style[1] + 2, style[2] + 2
    for number, sizes in enumerate(style[5:] if flags[0] & 1 else b""):
        halved = 1 if number else 0  # above the lowest resolution, a precinct covers three bands of half its size
        across, down = min(across, (sizes & 15) - halved), min(down, (sizes >> 4) - halved)
    return 1 << max(0, min(across, 12) + min(down, 12))


def check_run_lengths(data: bytes, pixels: int, bytes_per_pixel: int) -> None:
    """Check that run-length encoded pixels (PS3.5 annex G) unpack to the expected size.

    Raises:
        CodestreamError: the pixels unpack to more bytes, or there is not one segment for each byte of a pixel.
    """
    if len(data) < 64:
        raise CodestreamError("no header")
    count, *offsets = struct.unpack("<16I", data[:64])
    if count != bytes_per_pixel:
        raise CodestreamError("unexpected number of segments")
    for start, end in itertools.pairwise([*offsets[:count], len(data)]):
        if _unpacked_length(data[start:end], pixels + _RUN_PADDING) > pixels + _RUN_PADDING:
            raise CodestreamError("a segment with more bytes than pixels")


def _unpacked_length(segment: bytes, enough: int) -> int:
    """Bytes of an unpacked segment; counting stops beyond ``enough``."""
    at = length = 0
    while at < len(segment) and length <= enough:
        header = segment[at]
        if header < 128:
            length, at = length + header + 1, at + header + 2
        elif header > 128:
            length, at = length + 257 - header, at + 2
        else:
            at += 1
    return length
