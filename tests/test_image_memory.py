"""Files that announce more than they hold are refused in little memory, and large honest films are read in little."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from cbedge import RadiographError, load_radiograph
from cbedge.images.memory import MAX_WORKING_BYTES, working_memory

PROCESS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROCESS.exists(), reason="this system does not report the peak memory of a process"),
]
MAX_GROWTH_MB = 600
PEAK = """
from pathlib import Path
def peak():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) // 1024
"""
CHILD = (
    PEAK
    + """
import json, sys
import numpy as np
from PIL import Image
from cbedge import RadiographError, load_radiograph
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before, told, small = peak(), None, None
    try:
        film = load_radiograph(path)
        small = np.asarray(Image.fromarray(film.pixels).resize((8, 8), Image.Resampling.BOX)).round(3).tolist()
    except RadiographError as error:
        told = str(error)
    print(json.dumps([path.stem[3:], peak() - before, told, small]), flush=True)
    film = None
    path.unlink()
"""
)
SMALL = np.tile(np.arange(200, dtype=np.uint8), (240, 1))
EIGHT = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
SEQUENCE_END, ITEM = b"\xfe\xff\xdd\xe0\0\0\0\0", b"\xfe\xff\x00\xe0\0\0\0\0"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(values: np.ndarray, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **elements: object) -> bytes:
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    meta.TransferSyntaxUID = syntax
    dataset = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "DX", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelData = elements.pop("PixelData", None) or values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(frame: bytes, syntax: str, rows: int = 240, columns: int = 200, **elements: object) -> bytes:
    return dicom(np.empty((rows, columns, 0)), syntax, PixelData=encapsulate([frame]), **{**EIGHT, **elements})


def header_end(content: bytes) -> int:
    return 144 + int.from_bytes(content[140:144], "little")


@functools.cache
def zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(10_000_000)) for _ in range(count // 10_000_000)) + packer.flush()


@functools.cache
def deflated() -> tuple[bytes, bytes]:
    """File meta information without its length, and a deflated data set of a gigabyte."""
    content = dicom(np.zeros((2, 2), np.uint16), PixelData=bytes(8))
    start = header_end(content)
    packer = zlib.compressobj(1, wbits=-15)
    at = content.index(b"\xe0\x7f\x10\x00OW") + 8
    body = packer.compress(content[start:at] + struct.pack("<I", 10**9))
    body += b"".join(packer.compress(bytes(10_000_000)) for _ in range(100)) + packer.flush()
    explicit, syntax = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    meta = content[144:start].replace(struct.pack("<H", 20) + explicit, struct.pack("<H", 22) + syntax)
    return meta, body


def deflated_as(kind: str) -> bytes:
    meta, body = deflated()
    length = b"\x02\0\0\0UL\x04\0" + struct.pack("<I", len(meta))
    start = bytes(128) + b"DICM"
    long = b"\x02\0\x02\x01OB\0\0" + struct.pack("<I", 8192) + bytes(8192)
    syntax = struct.pack("<HHI", 2, 0x10, 22) + b"1.2.840.10008.1.2.1.99"
    return {
        "usual": start + length + meta + body,
        "without preamble": length + meta + body,
        "mark at the start": b"DICM" + length + meta + body,
        "without group length": start + meta + body,
        "wrong group length": start + length[:8] + struct.pack("<I", 4) + meta + body,
        "group length of another type": start + b"\x02\0\0\0US\x02\0\0\0" + meta + body,
        "long meta": start + meta[:14] + long + meta[14:] + body,
        "implicit meta": start + syntax + body,
    }[kind]


def inserted(element: bytes = b"", **elements: object) -> bytes:
    content = dicom(SMALL, **EIGHT, **elements)
    at = content.index(b"\xe0\x7f\x10\x00")
    return content[:at] + element + content[at:]


def element(tag: int, vr: bytes, value: bytes, undefined: bool = False) -> bytes:
    length = 0xFFFFFFFF if undefined else len(value)
    return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, length) + value


def fragments(raw: bytes) -> bytes:
    content = compressed(encoded(Image.fromarray(SMALL), "JPEG"), JPEGBaseline8Bit)
    at = content.index(b"\xe0\x7f\x10\x00OB") + 12
    return content[:at] + raw + SEQUENCE_END


def jpeg_with_junk(syntax: str) -> bytes:
    frame = large_jpeg()
    return compressed(frame[:2] + b"\0\1junk" + frame[2:], syntax)


@functools.cache
def large_jpeg() -> bytes:
    return encoded(Image.new("L", (20_000, 20_000)), "JPEG")


def jpeg2000(change: Callable[[bytearray], None] = lambda style: None, **coding: object) -> bytes:
    """25 megapixels whose coding style (T.800, A.6.1) is changed."""
    frame = encoded(Image.new("L", (5000, 5000)), "JPEG2000", irreversible=False, no_jp2=True, **coding)
    at = frame.index(b"\xff\x52")
    style = bytearray(frame[at + 4 : at + 14])
    change(style)
    segment = b"\xff\x52" + struct.pack(">H", 2 + len(style)) + style
    return compressed(frame[:at] + segment + frame[at + 14 :], JPEG2000Lossless, 5000, 5000)


def tiny_blocks(style: bytearray) -> None:
    style[6] = style[7] = 0


def tiny_precincts(style: bytearray) -> None:
    style[0] |= 1
    style += b"\x11" * (style[5] + 1)


def hidden_in_jp2() -> bytes:
    """A small codestream in a box before that of the large one."""
    small, large = (
        encoded(Image.new("L", size), "JPEG2000", irreversible=False) for size in ((200, 240), (9000, 9000))
    )
    codestream = small[small.index(b"\xff\x4f\xff\x51") :]
    box = struct.pack(">I4s", 8 + len(codestream), b"free") + codestream
    return compressed(large[:12] + box + large[12:], JPEG2000Lossless)


def run_lengths(segment: bytes) -> bytes:
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + segment
    return compressed(frame, RLELossless)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    extra: bytes = b"",
    size: tuple[int, int] = (200, 240),
    depth: int = 8,
    colour: int = 0,
    interlaced: int = 0,
    pixels: bytes | None = None,
) -> bytes:
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in SMALL)) if pixels is None else pixels
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(
    *tags: tuple[int, int, int, int], size: tuple[int, int] = (200, 240), tail: bytes = b"", following: int = 0
) -> bytes:
    usual = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
             (278, 4, 1, size[1]), (273, 4, 1, 8), (279, 4, 1, 48_000)]  # fmt: skip
    replaced = {tag[0] for tag in tags}
    entries = sorted([*(tag for tag in usual if tag[0] not in replaced), *tags])
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + directory + struct.pack("<L", following) + tail


def exif(count: int, tail: int) -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHLLL", 1, 0x11A, 5, count, 26, 0) + bytes(tail)


def segments(kind: int, data: bytes, count: int) -> bytes:
    frame = encoded(Image.fromarray(SMALL), "JPEG")
    return frame[:2] + (bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data) * count + frame[2:]


def two_frames() -> bytes:
    frame = encoded(Image.fromarray(SMALL), "JPEG")
    at = frame.index(b"\xff\xc0")
    large = frame[at : at + 5] + struct.pack(">HH", 20_000, 20_000) + frame[at + 9 : at + 13]
    return frame[: at + 13] + large + frame[at + 13 :]


def webp_frames() -> bytes:
    image = Image.fromarray(SMALL).convert("RGB")
    return encoded(image, "WEBP", save_all=True, append_images=[image.rotate(angle) for angle in range(1, 5)])


def chain_of_pages() -> bytes:
    start = len(tiff())
    return tiff(following=start, tail=b"".join(struct.pack("<HL", 0, start + 6 * n + 6) for n in range(2_000_000)))


DEFLATED = (
    "usual",
    "without preamble",
    "mark at the start",
    "without group length",
    "wrong group length",
    "group length of another type",
    "long meta",
    "implicit meta",
)
JPEGS = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLSLossless)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    **{f"deflated {kind}": (functools.partial(deflated_as, kind), "deflated and has more than") for kind in DEFLATED},
    **{f"junk in {kind.keyword}": (functools.partial(jpeg_with_junk, kind), "damaged or truncated") for kind in JPEGS},
    "run lengths": (lambda: run_lengths(b"\x81\0" * 8_000_000), "damaged or truncated"),
    "four components": (
        lambda: compressed(
            encoded(Image.new("RGBA", (5000, 5000)), "JPEG2000", irreversible=False, no_jp2=True),
            JPEG2000Lossless,
            5000,
            5000,
        ),
        "4 components, but SamplesPerPixel is 1",
    ),
    "tiny code blocks": (lambda: jpeg2000(tiny_blocks), "MB of memory"),
    "tiny tiles": (lambda: jpeg2000(tile_size=(20, 20)), "MB of memory"),
    "tiny precincts": (lambda: jpeg2000(tiny_precincts), "MB of memory"),
    "codestream behind another": (hidden_in_jp2, "9,000 x 9,000 compressed pixels, but Columns and Rows are 200 x 240"),
    "two frame headers": (lambda: compressed(two_frames(), JPEGBaseline8Bit), "damaged or truncated"),
    "colour of 48 megapixels": (
        lambda: dicom(
            np.empty((7000, 6850, 0)),
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
            PixelData=bytes(3 * 7000 * 6850 + 850_000),
            **EIGHT,
        ),
        "blank|memory",
    ),
    "frames behind the film": (lambda: dicom(SMALL, PixelData=bytes(100_000_000), **EIGHT), "pixels for 2,083 frames"),
    "fewer pixels than rows": (lambda: dicom(SMALL, Rows=8000, Columns=8000, **EIGHT), "damaged or truncated"),
    "offsets": (lambda: fragments(ITEM[:4] + struct.pack("<I", 80_000_000) + bytes(80_000_000)), "20,000,000 frames"),
    "fragments": (lambda: fragments(ITEM * 3_000_000), "too many parts"),
    "items": (lambda: inserted(element(0x00540220, b"SQ", ITEM * 2_000_000)), "16,000,000 bytes in the attribute View"),
    "items without length": (
        lambda: inserted(element(0x00540016, b"SQ", ITEM * 2_000_000 + SEQUENCE_END, True)),
        "too many parts|cannot be read as a DICOM file",
    ),
    "elements": (
        lambda: inserted(struct.pack("<HH2sH", 0x79, 0x1001, b"CS", 0) * 2_000_000),
        "too many parts",
    ),
    "numbers": (lambda: inserted(element(0x00281053, b"UT", b"1\\" * 10_000_000)), "bytes in the attribute RescaleS"),
    "character sets": (lambda: inserted(element(0x00080005, b"UT", b"\\ " * 9_000_000)), "SpecificCharacterSet"),
    "interlaced": (
        lambda: png(size=(8000, 8000), depth=16, colour=6, interlaced=1, pixels=zeros(520_000_000)),
        "MB of memory",
    ),
    "text chunks": (lambda: png(b"".join(chunk(b"zTXt", b"k\0\0" + zeros(10_000_000)) for _ in range(9))), "header"),
    "profile": (lambda: png(chunk(b"iCCP", b"k\0\0" + zeros(300_000_000))), "damaged header"),
    "private chunks": (lambda: png(chunk(b"abCd", b"") * 2_000_000), "too many parts"),
    "EXIF": (lambda: png(chunk(b"eXIf", exif(5_000_000, 40_000_000))), "40,000,032 bytes of EXIF data"),
    "segments": (lambda: segments(0xE5, b"", 9_000_000), "too many parts"),
    "parts of EXIF": (lambda: segments(0xE1, b"Exif\0\0" + bytes(60_000), 200), "too many parts of EXIF data"),
    "two frame headers in a file": (two_frames, "far too many pixels"),
    "progressive": (lambda: encoded(Image.new("CMYK", (7500, 7500)), "JPEG", progressive=True), "MB of memory"),
    "numbers in tags": (lambda: tiff((282, 5, 5_000_000, 200), tail=bytes(40_000_000)), "40,000,0.. bytes of numbers"),
    "numbers in further tags": (
        lambda: tiff((34665, 4, 1, 200), tail=bytes(66) + exif(5_000_000, 40_000_000)[8:]),
        "40,000,0.. bytes of num",
    ),
    "tile": (
        lambda: tiff((259, 3, 1, 8), (322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, 8), (325, 4, 1, 99)),
        "MB of memory",
    ),
    "pages": (chain_of_pages, "very many frames"),
    "animation": (webp_frames, "5 frames"),
    "canvas": (lambda: encoded(Image.new("RGB", (8000, 8000)), "WEBP", method=0), "MB of memory"),
}


def large(rows: int, columns: int, most: int, dtype: type = np.uint16) -> np.ndarray:
    """Brighter to the right and to the bottom."""
    down, right = np.linspace(0, most / 2, rows), np.linspace(0, most / 2, columns)
    return np.add.outer(down, right).astype(dtype)


@functools.cache
def thirty() -> np.ndarray:
    return large(6000, 5000, 65535)


@functools.cache
def thirty_in_eight_bits() -> np.ndarray:
    return (thirty() >> 8).astype(np.uint8)


def native(**elements: object) -> bytes:
    return dicom(thirty(), **elements)


FILMS: dict[str, Callable[[], bytes]] = {
    "16 bits": native,
    "padded and turned": lambda: native(PixelPaddingValue=0, PatientOrientation=["L", "F"]),
    "12 of 16 bits": lambda: dicom(thirty() >> 4, BitsStored=12, HighBit=11),
    "64 megapixels": lambda: dicom(large(8000, 8000, 65535)),
    "32 bits": lambda: dicom(
        large(6000, 5000, 4e9, np.uint32), BitsAllocated=32, BitsStored=32, HighBit=31, RescaleSlope=2
    ),
    "colour": lambda: dicom(
        thirty_in_eight_bits(),
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        PixelData=thirty_in_eight_bits().repeat(3).tobytes(),
        **EIGHT,
    ),
    "JPEG": lambda: compressed(encoded(Image.fromarray(thirty_in_eight_bits()), "JPEG"), JPEGBaseline8Bit, 6000, 5000),
    "JPEG 2000": lambda: compressed(
        encoded(Image.fromarray(thirty()), "JPEG2000", irreversible=False, no_jp2=True),
        JPEG2000Lossless,
        6000,
        5000,
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
    ),
    "PNG": lambda: encoded(Image.fromarray(thirty()), "PNG", compress_level=1),
    "PNG in colour": lambda: encoded(Image.fromarray(thirty_in_eight_bits()).convert("RGBA"), "PNG", compress_level=1),
    "progressive JPEG": lambda: encoded(Image.fromarray(thirty_in_eight_bits()), "JPEG", progressive=True),
    "TIFF": lambda: encoded(Image.fromarray(thirty()), "TIFF"),
    "turned TIFF": lambda: encoded(Image.fromarray(thirty().astype(np.float32)), "TIFF", compression="tiff_lzw"),
    "WebP": lambda: encoded(Image.fromarray(thirty_in_eight_bits()), "WEBP", quality=95, method=0),
}


def read_all(folder: Path, files: dict[str, Callable[[], bytes]]) -> dict[str, list]:
    """By file: MB of memory that it took, the message or ``None``, and 8 x 8 values."""
    script = folder / "child.py"
    script.write_text(CHILD)
    answers = {}
    names = list(files)
    for group in (names[i : i + 12] for i in range(0, len(names), 12)):  # of what is on the disk at a time
        paths = []
        for number, (name, make) in enumerate([("raster", png), ("film", inserted), *((n, files[n]) for n in group)]):
            paths.append(folder / f"{number:02} {name}.bin")
            paths[-1].write_bytes(make())
        done = run(script, *paths)
        assert not done.stderr, done.stderr[-2000:]
        answers |= {name: answer for name, *answer in map(json.loads, done.stdout.splitlines())}
    return answers


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=500, check=True
    )


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return read_all(tmp_path_factory.mktemp("bombs"), {name: make for name, (make, _) in BOMBS.items()})


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict:
    answers = read_all(tmp_path_factory.mktemp("films"), FILMS)
    thirty.cache_clear(), thirty_in_eight_bits.cache_clear()
    return answers


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_needs_much_memory_is_refused_in_little(name: str, bombs: dict):
    growth, told, _ = bombs[name]
    assert told is not None and "\n" not in told
    assert re.search(BOMBS[name][1], told), told
    assert growth < MAX_GROWTH_MB, f"{growth} MB"


@pytest.mark.parametrize("name", FILMS)
def test_a_large_film_is_read_in_little_memory(name: str, films: dict):
    growth, told, small = films[name]
    assert told is None
    wanted = np.add.outer(np.arange(8), np.arange(8)) / 16 + 1 / 16
    assert np.abs(np.array(small) - wanted).max() < 0.02
    assert growth < MAX_GROWTH_MB, f"{growth} MB"


@pytest.mark.parametrize("kind", ["TIFF", "JPEG 2000"])
def test_decoders_print_nothing_of_a_damaged_file(kind: str, capfd: pytest.CaptureFixture):
    noise = np.random.default_rng(0).integers(0, 65535, (240, 200)).astype(np.uint16)
    if kind == "TIFF":
        content = bytearray(encoded(Image.fromarray(noise), "TIFF", compression="tiff_adobe_deflate"))
        content[20_000:30_000] = bytes(10_000)
    else:
        frame = encoded(Image.fromarray(noise), "JPEG2000", irreversible=False, no_jp2=True)
        content = bytearray(
            compressed(
                frame[:300] + bytes(400) + frame[700:], JPEG2000Lossless, BitsAllocated=16, BitsStored=16, HighBit=15
            )
        )
    with contextlib.suppress(RadiographError):
        load_radiograph(bytes(content))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_films_that_need_much_memory_together_wait_for_each_other():
    held, most, changed = 0, 0, threading.Lock()

    def read(needed: int) -> None:
        nonlocal held, most
        with working_memory(needed, "film", (1, 1)):
            with changed:
                held += needed
                most = max(most, held)
            time.sleep(0.01)
            with changed:
                held -= needed

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, [MAX_WORKING_BYTES // 3] * 20 + [MAX_WORKING_BYTES]))
    assert held == 0 and MAX_WORKING_BYTES // 2 < most <= MAX_WORKING_BYTES


def test_large_films_in_many_threads_take_no_more_memory_than_one(tmp_path: Path):
    (tmp_path / "film.dcm").write_bytes(native())
    thirty.cache_clear()
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
from cbedge import load_radiograph
def read(number):
    return load_radiograph(sys.argv[1]).pixels.shape
with ThreadPoolExecutor(8) as pool:
    print(set(pool.map(read, range(8))), peak())
"""
    shapes, most = run("-c", PEAK + script, tmp_path / "film.dcm").stdout.strip().rsplit(" ", 1)
    assert shapes == "{(6000, 5000)}"
    assert int(most) < 100 + MAX_GROWTH_MB
