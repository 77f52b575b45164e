"""The same film gives the same findings, whatever it is stored in."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import EXAMPLES, needs_default_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from cbedge import Report, ReportGenerator

TOLERANCE = 0.03
_STORED_AS = {
    1: None,
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}
_TURNS: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {
    ("L", "F"): lambda a: a,
    ("R", "F"): lambda a: a[:, ::-1],
    ("L", "H"): lambda a: a[::-1],
    ("R", "H"): lambda a: a[::-1, ::-1],
    ("F", "L"): lambda a: a.T,
    ("H", "R"): lambda a: a[::-1, ::-1].T,
}


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """A real radiograph as uint8, using the whole range."""
    with Image.open(EXAMPLES / "chest_pa.png") as image:
        return np.asarray(image.resize((460, 489)))


@pytest.fixture(scope="module")
def generator() -> ReportGenerator:
    # Containers that give the same pixels, bit by bit, share what is computed from them.
    return ReportGenerator.from_pretrained(device="cpu", variant="int4", recent_studies=64)


@pytest.fixture(scope="module")
def wanted(generator: ReportGenerator, film: np.ndarray) -> Report:
    return generator.generate(film, max_new_tokens=1)


def picture_file(draw: Callable, film: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """A PNG, JPEG, WebP or TIFF, in bytes, a file object or a PIL image."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]))
    modes = {
        "PNG": ["L", "RGB", "RGBA", "P", "LA", "16"],
        "JPEG": ["L", "RGB"],
        "WEBP": ["RGB", "RGBA"],
        "TIFF": ["L", "RGB", "16"],
    }
    mode = draw(st.sampled_from(modes[kind]))
    lossy = kind in ("JPEG", "WEBP")  # half of the range and lossy is not the same film any more
    low, share = (0, 1.0) if lossy else draw(st.sampled_from([(0, 1.0), (0, 0.5), (60, 0.6)]))
    values = low + film * share
    profile = None
    if mode == "16":
        depth = draw(st.sampled_from([1, 16, 200]))
        if depth == 200 and draw(st.booleans()):
            values, profile = 65535 / depth * (values * depth / 65535) ** 2.2, _linear_profile()
        image = Image.fromarray((values * depth).astype(np.uint16))
    else:
        image = Image.fromarray(np.rint(values).astype(np.uint8)).convert(mode)
    tag = draw(st.integers(1, 8)) if mode != "16" else 1
    if _STORED_AS[tag]:
        image = image.transpose(getattr(Image.Transpose, str(_STORED_AS[tag])))
    exif = Image.Exif()
    exif[0x112] = tag
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, icc_profile=profile, **({"quality": 95} if lossy else {}))
    data = buffer.getvalue()
    given_as = draw(st.sampled_from(["bytes", "file object", "image"]))
    told = {"kind": kind, "mode": mode, "tag": tag, "low": low, "share": share, "given as": given_as}
    told["linear"] = profile is not None
    source = {"bytes": data, "file object": io.BytesIO(data), "image": Image.open(io.BytesIO(data))}[given_as]
    return source, told


def _linear_profile() -> bytes:
    """An ICC profile for grey values that are proportional to light."""
    header = bytearray(128)
    header[12:24], header[36:40] = b"mntrGRAYXYZ ", b"acsp"
    return bytes(header) + struct.pack(">L4sLL", 1, b"kTRC", 144, 12) + b"curv" + bytes(8)


def dicom_file(draw: Callable, film: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """A DICOM file or dataset with any of the ways in which a header describes the same pixels."""
    orientation = draw(st.sampled_from([*_TURNS]))
    bits = draw(st.sampled_from([8, 10, 12, 14, 16]))
    signed = draw(st.booleans()) and bits > 8
    photometric = draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"]))
    inverse = draw(st.booleans())
    syntax = draw(
        st.sampled_from(
            [
                ExplicitVRLittleEndian,
                ImplicitVRLittleEndian,
                ExplicitVRBigEndian,
                DeflatedExplicitVRLittleEndian,
                RLELossless,
                JPEG2000Lossless,
            ]
        )
    )
    if syntax == JPEG2000Lossless:
        bits, signed = 8, False
    slope, intercept = draw(st.sampled_from([(None, None), (1, 0), (2.5, -100), (-1, 4000)]))
    shown = draw(st.sampled_from(["none", "window", "exact", "lut", "useless"]))
    padding, shutter = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    padding = padding and syntax != JPEG2000Lossless
    used = 2**bits - 1 if not padding else 2**bits - 2
    grey = film / 255.0
    if inverse or photometric == "MONOCHROME1":
        grey = 1 - grey
    if slope is not None and slope < 0:
        grey = 1 - grey
    stored = np.rint(grey * used).astype(np.int64) - (2 ** (bits - 1) if signed else 0)
    stored = _TURNS[orientation](stored)
    if padding or shutter:
        stored = np.pad(stored, 25, constant_values=2**bits - 1 - (2 ** (bits - 1) if signed else 0))
    dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    values = stored.astype(dtype)
    dataset = _dataset(values, bits, signed, photometric, syntax)
    dataset.PatientOrientation = list(orientation)
    if inverse or draw(st.booleans()):
        dataset.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    if padding:
        dataset.add_new("PixelPaddingValue", "SS" if signed else "US", int(values[0, 0]))
    if shutter:
        rows, columns = values.shape
        dataset.ShutterShape = "RECTANGULAR"
        dataset.ShutterUpperHorizontalEdge, dataset.ShutterLowerHorizontalEdge = 25, rows - 24
        dataset.ShutterLeftVerticalEdge, dataset.ShutterRightVerticalEdge = 25, columns - 24
    if slope is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
    low = (slope or 1) * -(2 ** (bits - 1) if signed else 0) + (intercept or 0)
    ends = sorted((low, low + (slope or 1) * used))
    _show(dataset, shown, ends, bits, signed, slope)
    told = {
        "orientation": orientation,
        "bits": bits,
        "signed": signed,
        "photometric": photometric,
        "inverse": inverse,
        "syntax": syntax.name,
        "slope": slope,
        "shown": shown,
        "padding": padding,
        "shutter": shutter,
    }
    if syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    if draw(st.booleans()):
        return dataset, told
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue(), told


def array(draw: Callable, film: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """A NumPy array of any type and layout."""
    kind = draw(st.sampled_from(["u1", "<u2", ">u2", "<i2", "<i4", "<u4", "f2", "f4", "f8"]))
    share = draw(st.sampled_from([1.0, 0.5]))
    values = film / 255 if kind[0] == "f" else film.astype(np.float64) * (1 if kind == "u1" else 100)
    made = (values * share).astype(kind)
    shape = draw(st.sampled_from(["2d", "1 channel", "3 channels", "view"]))
    if shape == "1 channel":
        made = made[..., None]
    elif shape == "3 channels":
        made = np.repeat(made[..., None], 3, 2)
    elif shape == "view":
        made = np.asfortranarray(made)
    return made, {"dtype": kind, "shape": shape, "share": share}


def _dataset(values: np.ndarray, bits: int, signed: bool, photometric: str, syntax: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(
        None,
        {},
        file_meta=meta,
        preamble=b"\0" * 128,
        is_implicit_VR=syntax == ImplicitVRLittleEndian,
        is_little_endian=syntax != ExplicitVRBigEndian,
    )
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation, dataset.ViewPosition = "DX", photometric, "PA"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.BitsAllocated = 1, 8 * values.dtype.itemsize
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    if syntax == JPEG2000Lossless:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
        dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    else:
        big = syntax == ExplicitVRBigEndian
        data = values.astype(values.dtype.newbyteorder(">" if big else "<")).tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    return dataset


def _show(dataset: FileDataset, shown: str, ends: list[float], bits: int, signed: bool, slope: float | None) -> None:
    centre, width = (ends[0] + ends[1]) / 2, ends[1] - ends[0]
    if shown == "window":
        dataset.WindowCenter, dataset.WindowWidth = f"{centre:.6g}", f"{width + 1:.6g}"
    elif shown == "exact":
        dataset.WindowCenter, dataset.WindowWidth = f"{centre:.6g}", f"{width:.6g}"
        dataset.VOILUTFunction = "LINEAR_EXACT"
    elif shown == "useless":
        dataset.WindowCenter, dataset.WindowWidth = "40", "0"
    elif shown == "lut" and not signed and slope in (None, 1):
        item = pydicom.Dataset()
        entries = min(2**bits, 65535)
        order = ">" if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
        item.LUTDescriptor, item.LUTData = [entries, 0, 16], np.arange(entries).astype(f"{order}u2").tobytes()
        dataset.VOILUTSequence = pydicom.Sequence([item])


@needs_default_model
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_same_film_in_any_container_gives_the_same_findings(
    generator: ReportGenerator, film: np.ndarray, wanted: Report, data: st.DataObject
):
    make = data.draw(st.sampled_from([picture_file, dicom_file, dicom_file, array]))
    source, told = make(data.draw, film)
    report = generator.generate(source, max_new_tokens=1)
    worst = max(abs(report.finding_scores[name] - score) for name, score in wanted.finding_scores.items())
    assert worst <= TOLERANCE, f"{told}: a score differs by {worst:.3f}"
    assert report.image_findings == wanted.image_findings, told
