import io
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import EXAMPLES, draw_chest, needs_program
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from cbedge import RadiographError, load_radiograph
from cbedge.images.dicom_file import read_header
from cbedge.images.intensity import stretch

CHEST = draw_chest(2).astype(np.uint16) * 16  # 12 bits


def make_dicom(values: np.ndarray = CHEST, syntax: str = ExplicitVRLittleEndian, **elements: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation = "DX", "MONOCHROME2"
    dataset.PatientName = "Secret^Name"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_the_example_agrees_with_its_picture():
    dicom = load_radiograph(EXAMPLES / "chest_pa.dcm")
    picture = load_radiograph(EXAMPLES / "chest_pa.png").pixels
    small = np.asarray(Image.fromarray(dicom.pixels).resize(picture.shape[::-1], Image.Resampling.LANCZOS))
    assert dicom.view == "frontal"
    assert np.abs(small - picture).mean() < 0.01


def test_monochrome1_is_turned_round():
    plain = load_radiograph(make_dicom()).pixels
    inverted = load_radiograph(make_dicom(PhotometricInterpretation="MONOCHROME1")).pixels
    assert np.allclose(plain + inverted, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["MONOCHROME1", "monochrome 1", "MONOCHROME_1", "MONO1"])
@pytest.mark.parametrize("planes", [1, 3])
def test_monochrome1_is_inverted_once_whatever_its_spelling_and_planes(name: str, planes: int):
    values = np.repeat(4095 - CHEST[..., None], planes, axis=2)
    elements = {"SamplesPerPixel": planes, "PlanarConfiguration": 0, "PhotometricInterpretation": name}
    data = make_dicom(4095 - CHEST, PixelData=values.tobytes(), **elements)
    film = load_radiograph(data)
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 0.01 and film.warnings == ()


@pytest.mark.parametrize("stored", [12, 16])
@pytest.mark.parametrize("syntax", [None, pydicom.uid.RLELossless])
def test_sign_extended_pixels_are_signed_whatever_the_header_says(syntax: str | None, stored: int):
    data = make_dicom(CHEST.astype(np.int16) - 2048, BitsStored=stored, HighBit=stored - 1)
    if syntax is not None:
        dataset, buffer = pydicom.dcmread(io.BytesIO(data)), io.BytesIO()
        dataset.compress(syntax)
        dataset.save_as(buffer)
        data = buffer.getvalue()
    film = load_radiograph(data)
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 1e-3
    assert len(film.warnings) == 1 and "PixelRepresentation" in film.warnings[0]


@pytest.mark.parametrize("values", [CHEST, 4095 - CHEST, CHEST * 16, 65535 - CHEST * 16])
def test_unsigned_pixels_are_unsigned_whatever_the_header_says(values: np.ndarray):
    bits = {"BitsStored": 12, "HighBit": 11} if values.max() < 4096 else {"BitsStored": 16, "HighBit": 15}
    wanted, film = (load_radiograph(make_dicom(values, PixelRepresentation=sign, **bits)) for sign in (0, 1))
    assert np.array_equal(film.pixels, wanted.pixels) and wanted.warnings == ()
    assert len(film.warnings) == 1 and "PixelRepresentation" in film.warnings[0]


@pytest.mark.parametrize("padding", [-32768, 32767])
def test_signed_pixels_stay_signed(padding: int):
    values = (CHEST.astype(np.int32) * 16 - 32768 if padding > 0 else CHEST).astype(np.int16)
    values[:40] = padding
    film = load_radiograph(make_dicom(values, PixelRepresentation=1, BitsStored=16, HighBit=15))
    assert np.array_equal(film.pixels, load_radiograph(values).pixels) and film.warnings == ()


@pytest.mark.parametrize(
    "values",
    [
        np.where(CHEST < 400, 65535, CHEST),  # a burnt-in white on 12 bits
        np.where(CHEST < 400, CHEST, 49152 + CHEST),  # a film in the upper quarter on a dark border
        CHEST * 16,
    ],
)
def test_unsigned_pixels_stay_unsigned(values: np.ndarray):
    film = load_radiograph(make_dicom(values.astype(np.uint16), BitsStored=16, HighBit=15))
    assert np.array_equal(film.pixels, load_radiograph(values.astype(np.uint16)).pixels) and film.warnings == ()


_UTF8_CHEST = "\u80f8\u90e8".encode().decode("latin-1")  # whose bytes pydicom writes


def _region(meaning: str, code: str = "1") -> list[pydicom.Dataset]:
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "SCT", meaning
    return [item]


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        ({"BodyPartExamined": "FOOT"}, "BodyPartExamined"),
        ({"BodyPartExamined": "THORACIC SPINE"}, "BodyPartExamined"),
        ({"BodyPartExamined": "THORAX"}, None),
        *(
            ({"BodyPartExamined": text}, None)
            for text in ("BRUST", "PECHO", "POITRINE", "TORAX", "T\u00d3RAX", _UTF8_CHEST)
        ),
        ({"BodyPartExamined": "\u8db3".encode().decode("latin-1")}, "BodyPartExamined"),
        ({"AnatomicRegionSequence": _region("Foot", "56459004")}, "AnatomicRegionSequence"),
        ({"AnatomicRegionSequence": _region("Thoracic vertebra")}, "AnatomicRegionSequence"),
        ({"AnatomicRegionSequence": _region("Chest")}, None),
        ({"AnatomicRegionSequence": _region("Brustkorb", "51185008")}, None),
    ],
)
def test_another_body_part_is_warned_of(elements: dict, named: str | None):
    warned = load_radiograph(make_dicom(**elements)).warnings
    assert [warning.split()[3] for warning in warned] == ([named] if named else [])


def test_signed_compressed_pixels_are_signed_whatever_the_header_says():
    signed = CHEST.astype(np.int16) - 2048
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(signed, PixelRepresentation=1)))
    dataset.compress(pydicom.uid.JPEG2000Lossless)
    dataset.PixelRepresentation = 0
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    radiograph = load_radiograph(buffer.getvalue())
    assert np.abs(radiograph.pixels - load_radiograph(make_dicom()).pixels).max() < 1e-3
    assert any("PixelRepresentation" in warning for warning in radiograph.warnings)


def test_rescale_and_window_are_applied():
    rescaled = load_radiograph(
        make_dicom(RescaleSlope=2, RescaleIntercept=-100, WindowCenter=2000, WindowWidth=1000)
    ).pixels
    values = CHEST.astype(float) * 2 - 100
    assert (rescaled[values <= 1500] == 0).all() and (rescaled[values >= 2500] == 1).all()


def test_a_voi_lut_is_applied():
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], np.arange(4095, -1, -1).astype("<u2").tobytes()
    turned = load_radiograph(make_dicom(VOILUTSequence=pydicom.Sequence([item]))).pixels
    assert np.corrcoef(turned.ravel(), CHEST.ravel())[0, 1] < -0.99


@pytest.mark.parametrize("encoder", ["JPEG", "JPEG2000"])
def test_compressed_pixels_are_read(encoder: str):
    grey = draw_chest(3)
    buffer = io.BytesIO()
    if encoder == "JPEG":
        syntax = pydicom.uid.JPEGBaseline8Bit
        Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    else:
        syntax = pydicom.uid.JPEG2000Lossless
        Image.fromarray(grey).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    frames = pydicom.encaps.encapsulate([buffer.getvalue()])
    data = make_dicom(grey, syntax, PixelData=frames, BitsAllocated=8, BitsStored=8, HighBit=7)
    assert np.corrcoef(load_radiograph(data).pixels.ravel(), grey.ravel())[0, 1] > 0.99


def test_run_lengths_are_read():
    grey = draw_chest(3)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(grey, BitsAllocated=8, BitsStored=8, HighBit=7)))
    dataset.compress(pydicom.uid.RLELossless)
    file = io.BytesIO()
    dataset.save_as(file)
    assert np.corrcoef(load_radiograph(file.getvalue()).pixels.ravel(), grey.ravel())[0, 1] > 0.99


@needs_program("dcmcjpls", "dcmtk, which writes JPEG-LS,")
@pytest.mark.parametrize("option", ["--encode-lossless", "--encode-nearlossless"])
def test_jpeg_ls_is_read(option: str, tmp_path: Path):
    grey = draw_chest(3)
    plain, compressed = tmp_path / "plain.dcm", tmp_path / "compressed.dcm"
    plain.write_bytes(make_dicom(grey, BitsAllocated=8, BitsStored=8, HighBit=7))
    subprocess.run(["dcmcjpls", option, plain, compressed], check=True)
    assert "JPEG-LS" in pydicom.dcmread(compressed).file_meta.TransferSyntaxUID.name
    assert np.corrcoef(load_radiograph(compressed).pixels.ravel(), grey.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("elements", "told"),
    [
        ({"Modality": "CT"}, "modality CT"),
        ({"NumberOfFrames": 3}, "3 frames"),
        ({"Rows": 20_000, "Columns": 20_000}, "the limit is 64,000,000"),
        ({"PixelData": b"\0" * 100}, "damaged or truncated"),
        ({"PixelData": b""}, "has no image"),
    ],
)
def test_what_is_no_single_radiograph_is_named(elements: dict, told: str):
    with pytest.raises(RadiographError, match=told):
        load_radiograph(make_dicom(**elements))


def test_an_unsupported_transfer_syntax_is_named():
    data = make_dicom(syntax=pydicom.uid.MPEG2MPML, PixelData=pydicom.encaps.encapsulate([b"\0" * 10]))
    with pytest.raises(RadiographError, match=r"transfer syntax .*MPEG2"):
        load_radiograph(data)


def test_a_cut_off_file_is_named_without_patient_data(capfd):
    for length in (140, 300, 700, 5000):
        with pytest.raises(RadiographError) as caught:
            load_radiograph(make_dicom()[:length])
        assert "Secret" not in str(caught.value)
    captured = capfd.readouterr()
    assert "Secret" not in captured.out + captured.err


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_compressed_file_that_is_cut_off_is_called_so(share: float):
    content = (EXAMPLES / "chest_pa.dcm").read_bytes()
    with pytest.raises(RadiographError, match="truncated"):
        load_radiograph(content[: int(share * len(content))])


def test_lateral_is_read_from_the_header():
    film = load_radiograph(make_dicom(ViewPosition="LL", StudyInstanceUID="1.2.3"))
    assert film.view == "lateral" and film.study_uid == "1.2.3"
    odd = load_radiograph(make_dicom(ViewPosition="ODD"))
    assert odd.view is None and "ViewPosition" in odd.warnings[0]


@pytest.mark.parametrize(
    ("elements", "view", "warned"),
    [
        ({"ViewPosition": "LLD"}, "frontal", "decubitus"),
        ({"ViewPosition": "LATL"}, "lateral", ""),
        ({"ViewPosition": "RAO"}, None, "oblique"),
        ({"ViewPosition": " pa "}, "frontal", ""),
        *(
            ({"ViewPosition": text}, "lateral", "")
            for text in ("LAT CHEST", "RLAT UPRIGHT", "XTABLE LAT", "CHEST LEFT LAT")
        ),
        *(({"ViewPosition": text}, "frontal", "") for text in ("POST_ANT", "P-A", "ANT-POST", "AP ERECT", "CHEST PA")),
        ({"ViewPosition": "L LAT DECUB"}, "frontal", "decubitus"),
        ({"ViewPosition": "?"}, None, "unknown value"),
        ({"ViewPosition": "PA/LAT"}, None, "unknown value"),
        ({"view": ("399173006", "SCT", "left lateral")}, "lateral", ""),
        ({"view": ("R-10206", "SRT", "antero-posterior")}, "frontal", ""),
        ({"view": ("X1", "99LOCAL", "Lateral erect")}, "lateral", ""),
        ({"view": ("X1", "99LOCAL", "special")}, None, "ViewCodeSequence"),
        ({"ViewPosition": "PA", "view": ("399067008", "SCT", "lateral")}, "frontal", "contradicts"),
        ({"PatientOrientation": ["A", "F"]}, "lateral", ""),
        ({"PatientOrientation": ["L", "F"]}, "frontal", ""),
        ({"PatientOrientation": ["A", "F"], "ViewPosition": "PA"}, "frontal", "PatientOrientation"),
        ({"PatientOrientation": ["L", "L"]}, None, "PatientOrientation"),
        ({"BodyPartExamined": "HAND"}, None, "Body"),
        ({"BodyPartExamined": "THORAX"}, None, ""),
    ],
)
def test_the_view_is_read_from_three_attributes_and_doubts_are_said(elements: dict, view: str | None, warned: str):
    elements = dict(elements)
    if "view" in elements:
        code, scheme, meaning = elements.pop("view")
        item = pydicom.Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, scheme, meaning
        elements["ViewCodeSequence"] = pydicom.Sequence([item])
    film = load_radiograph(make_dicom(**elements))
    assert film.view == view
    assert (warned in " ".join(film.warnings)) if warned else film.warnings == ()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (["L", "F"], lambda a: a),
        (["R", "F"], lambda a: a[:, ::-1]),
        (["L", "H"], lambda a: a[::-1]),
        (["R", "H"], lambda a: a[::-1, ::-1]),
        (["F", "L"], lambda a: a.T),
        (["F", "R"], lambda a: a[:, ::-1].T),
        (["H", "L"], lambda a: a[::-1].T),
        (["H", "R"], lambda a: a[::-1, ::-1].T),
        (["RIGHT", "FOOT"], lambda a: a[:, ::-1]),
        (["RP", "FA"], lambda a: a[:, ::-1]),
        *((text, lambda a: a[:, ::-1]) for text in ("R/F", "R,F", "R, F", "R F", "RF", "r\\f ")),
    ],
)
def test_patient_orientation_is_obeyed(orientation: Any, turn: Callable[[np.ndarray], np.ndarray]):
    turned = load_radiograph(make_dicom(np.ascontiguousarray(turn(CHEST)), PatientOrientation=orientation))
    assert np.array_equal(turned.pixels, load_radiograph(make_dicom()).pixels)


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        ({"WindowCenter": "100", "WindowWidth": "0"}, "WindowWidth"),
        ({"RescaleSlope": None}, "RescaleSlope"),
        ({"WindowCenter": "2048", "WindowWidth": "4096", "VOILUTFunction": "ODD"}, "VOILUTFunction"),
        ({"PhotometricInterpretation": "ODD"}, "PhotometricInterpretation"),
        ({"HighBit": 3}, "HighBit"),
        ({"BitsStored": 0}, "BitsStored"),
        ({"WindowCenter": "90000", "WindowWidth": "10"}, "WindowCenter with WindowWidth"),
        ({"WindowCenter": "0.5", "WindowWidth": "1"}, "WindowCenter with WindowWidth"),
        ({"WindowCenter": "2048", "WindowWidth": "2"}, "WindowCenter with WindowWidth"),
        ({"PixelRepresentation": None}, "PixelRepresentation"),
        ({"Modality": ""}, "Modality"),
        ({"BitsStored": 10, "HighBit": 9}, "BitsStored"),
    ],
)
def test_an_unusable_attribute_is_named_and_does_without(elements: dict, named: str):
    film = load_radiograph(make_dicom(**elements))
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 0.01
    assert len(film.warnings) == 1 and f"attribute {named} " in film.warnings[0]


@pytest.mark.parametrize(
    "elements",
    [
        {"PhotometricInterpretation": "monochrome2"},
        {"Modality": "dx "},
        {"PresentationLUTShape": "IDENTITY"},
        {"WindowCenter": ["1", "2048"], "WindowWidth": ["0", "4096"]},
    ],
)
def test_spelling_and_further_windows_need_no_warning(elements: dict):
    film = load_radiograph(make_dicom(**elements))
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 0.01 and film.warnings == ()


@pytest.mark.parametrize(
    ("charset", "reason", "indication", "warned"),
    [
        ("", b"cough\\fever", "cough, fever", False),
        ("", rb"cough\X0D\fever", "cough, fever", False),
        ("ISO_IR 100", "Rückgang".encode("latin-1"), "Rückgang", False),
        ("ISO_IR 192", "Rückgang".encode(), "Rückgang", False),
        ("ISO_IR 100", "Rückgang".encode(), "CHEST", True),
        ("ISO_IR 192", "Rückgang".encode("latin-1"), "CHEST", True),
        ("", "кашель".encode("cp1251"), "CHEST", True),
        ("ISO_IR 144", "кашель".encode("iso8859_5"), "кашель", False),
        ("\\ISO 2022 IR 58", b"\x1b$)A" + "咳嗽".encode("gb2312"), "咳嗽", False),
        ("", b"cough " * 200, "CHEST", True),
    ],
)
def test_an_indication_is_joined_decoded_or_ignored_with_a_warning(
    charset: str, reason: bytes, indication: str, warned: bool
):
    data = make_dicom(AdmittingDiagnosesDescription="CHEST")
    raw = {"SpecificCharacterSet": ("CS", charset.encode()), "ReasonForStudy": ("LO", reason)}
    dataset = pydicom.dcmread(io.BytesIO(data))
    for keyword, (vr, value) in raw.items():
        tag = pydicom.tag.Tag(keyword)
        dataset[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
    film = load_radiograph(dataset)
    assert film.indication == indication
    assert any("ReasonForStudy" in text and "ignored" in text for text in film.warnings) == warned


def test_presentation_lut_shape_inverts_once():
    plain = load_radiograph(make_dicom()).pixels
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        negative = make_dicom(4095 - CHEST, PhotometricInterpretation=photometric, PresentationLUTShape="INVERSE")
        assert np.allclose(load_radiograph(negative).pixels, plain, atol=1e-3)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(65535, None), (60000, 65535), (5000, None)])
@pytest.mark.parametrize("border", [0, 1, 30, ((0, 3), (250, 0))])
def test_padding_is_cut_off_and_is_no_part_of_the_range(photometric: str, value: int, limit: int | None, border: Any):
    plain = load_radiograph(make_dicom(PhotometricInterpretation=photometric)).pixels
    holed = CHEST.copy()
    holed[10:30, 5:15] = value
    padded = np.pad(holed, border, constant_values=value)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(padded, PhotometricInterpretation=photometric)))
    dataset.add_new("PixelPaddingValue", "US", value)
    if limit:
        dataset.add_new("PixelPaddingRangeLimit", "US", limit)
    file = io.BytesIO()
    dataset.save_as(file)
    film = load_radiograph(file.getvalue()).pixels
    assert film.shape == plain.shape and (film[10:30, 5:15] == 0).all()
    film[10:30, 5:15] = plain[10:30, 5:15]
    assert np.abs(film - plain).max() < 0.01


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("value", [0, 4095])
@pytest.mark.parametrize("border", [0, 20])
def test_inside_a_film_a_padding_value_is_a_grey_value(photometric: str, value: int, border: int):
    values = np.clip(CHEST, 200, 3900)
    values[100:130, 60:90] = value  # a marker, far from the edges
    plain = load_radiograph(make_dicom(values, PhotometricInterpretation=photometric)).pixels
    padded = np.pad(values, border, constant_values=value)
    film = load_radiograph(make_dicom(padded, PhotometricInterpretation=photometric, PixelPaddingValue=value)).pixels
    assert np.array_equal(film, plain)


@pytest.mark.parametrize(("value", "stated"), [(4095, 65535), (0, 61440)])
@pytest.mark.parametrize("border", [30, ((0, 0), (30, 0))])
def test_a_padding_value_of_more_bits_than_stored_is_compared_by_its_lowest(value: int, stated: int, border: Any):
    values = np.clip(CHEST, 1, 4094)
    padded = np.pad(values, border, constant_values=value)
    film = load_radiograph(make_dicom(padded, PixelPaddingValue=stated))
    assert np.array_equal(film.pixels, load_radiograph(make_dicom(values)).pixels)
    assert len(film.warnings) == 1 and "PixelPaddingValue" in film.warnings[0]


def test_white_film_is_no_padding_of_more_bits_than_stored():
    values = CHEST.copy()
    values[100:140, 60:90] = 4095
    films = [load_radiograph(make_dicom(values, **found)) for found in ({}, {"PixelPaddingValue": 65535})]
    assert np.array_equal(films[0].pixels, films[1].pixels) and films[1].warnings == ()


_SHUTTER = {
    "ShutterShape": "RECTANGULAR",
    "ShutterLeftVerticalEdge": 40,
    "ShutterRightVerticalEdge": 241,
    "ShutterUpperHorizontalEdge": 30,
    "ShutterLowerHorizontalEdge": 271,
}
_CIRCLE = {"ShutterShape": "CIRCULAR", "CenterOfCircularShutter": [150, 140], "RadiusOfCircularShutter": 90}
_TRIANGLE = {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [31, 141, 270, 240, 270, 41]}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("outside", [0, 4095])
def test_what_a_rectangular_shutter_hides_is_padding(photometric: str, outside: int):
    values = np.pad(CHEST, ((30, 50), (40, 20)), constant_values=outside)
    film = load_radiograph(make_dicom(values, PhotometricInterpretation=photometric, **_SHUTTER))
    wanted = load_radiograph(make_dicom(PhotometricInterpretation=photometric))
    assert np.array_equal(film.pixels, wanted.pixels) and film.warnings == ()


@pytest.mark.parametrize(
    "shutter", [_CIRCLE, _TRIANGLE, {**_SHUTTER, **_CIRCLE, "ShutterShape": ["CIRCULAR", "RECTANGULAR"]}]
)
@pytest.mark.parametrize("padding", [{}, {"PixelPaddingValue": 4095}])
def test_what_other_shutters_hide_is_background(shutter: dict, padding: dict):
    values = np.pad(np.clip(CHEST, 0, 4000), ((30, 50), (40, 20)), constant_values=2000)
    row, column = np.ogrid[1 : values.shape[0] + 1, 1 : values.shape[1] + 1]
    if shutter is _TRIANGLE:
        distance = np.minimum(270 - row, ((row - 31) * 99 / 239 - abs(column - 140.5)) * 0.924)
    else:
        distance = 90 - np.hypot(row - 150, column - 140)
    visible = distance > 0.7
    values[distance < -0.7] = 4095
    film = load_radiograph(make_dicom(values, **shutter, **padding)).pixels
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    height, width = film.shape
    left = columns[0] - (width - len(columns)) // 2
    box = slice(rows[-1] + 1 - height, rows[-1] + 1), slice(left, left + width)
    wanted = stretch(values[box], visible[box])
    assert abs(height - len(rows)) <= 2 and abs(width - len(columns)) <= 2
    assert (abs(film - wanted) > 0.01).mean() < 0.01  # pixels on the edge


@pytest.mark.parametrize(
    "shutter",
    [
        {"ShutterShape": "BITMAP"},
        {"ShutterShape": "RECTANGULAR", "ShutterLeftVerticalEdge": 3},
        {**_SHUTTER, "ShutterRightVerticalEdge": 20},
        {**_CIRCLE, "RadiusOfCircularShutter": 2_000_000_000},
        {**_CIRCLE, "RadiusOfCircularShutter": 1},
        {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [1, 2, 3, 4, 5, 6, 7]},
    ],
)
def test_an_invalid_shutter_is_named_and_ignored(shutter: dict):
    film = load_radiograph(make_dicom(**shutter))
    assert np.array_equal(film.pixels, load_radiograph(make_dicom()).pixels)
    assert len(film.warnings) == 1 and "ShutterShape" in film.warnings[0]


def _jpeg(mode: str = "L", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((CHEST // 16).astype(np.uint8)).convert(mode).save(buffer, "JPEG", quality=97, **options)
    return buffer.getvalue() + b"\0" * (buffer.tell() % 2)


def _fragments(*parts: bytes, table: bytes = b"") -> bytes:
    items = (b"\xfe\xff\x00\xe0" + struct.pack("<L", len(part)) + part for part in (table, *parts))
    return b"".join(items) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def _compressed(pixels: bytes, **elements: object) -> bytes:
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": pixels, **elements}
    dataset, buffer = pydicom.dcmread(io.BytesIO(make_dicom(**eight))), io.BytesIO()
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("fragments", [1, 3])
def test_fragments_of_uncompressed_pixels_are_joined(fragments: int):
    pixels = (CHEST // 16).astype(np.uint8).tobytes()
    size = len(pixels) // fragments
    parts = [pixels[i * size : (i + 1) * size] for i in range(fragments)]
    data = _compressed(_fragments(*parts)).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0")
    film = load_radiograph(data)
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 0.01
    assert len(film.warnings) == 1 and "PixelData" in film.warnings[0]


def test_compressed_pixels_under_an_uncompressed_transfer_syntax_are_refused():
    data = _compressed(_fragments(_jpeg())).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0")
    with pytest.raises(RadiographError, match="compressed pixels, but an uncompressed TransferSyntaxUID"):
        load_radiograph(data)


_COLOUR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422"}
_HALF = len(_jpeg()) // 4 * 2


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (_compressed(_fragments(_jpeg())), None),
        (_compressed(_fragments(_jpeg("RGB")), **_COLOUR), None),
        (_compressed(_fragments(_jpeg("RGB")), PlanarConfiguration=0, **_COLOUR), None),
        (_compressed(_fragments(_jpeg("RGB")), PlanarConfiguration=1, **_COLOUR), None),
        (_compressed(_fragments(_jpeg()), BitsAllocated=16), "BitsAllocated"),
        (_compressed(_fragments(_jpeg()), BitsAllocated=16, BitsStored=12, HighBit=11), "BitsAllocated"),
        (_compressed(_fragments(_jpeg(), table=bytes(4))), None),
        (_compressed(_fragments(_jpeg(), table=b"\xff\xff\xff\xff")), "PixelData"),
        (
            _compressed(_fragments(_jpeg()[:_HALF], _jpeg()[_HALF:], table=struct.pack("<LL", 0, 8 + _HALF))),
            "PixelData",
        ),
        (_compressed(_fragments(_jpeg()[:_HALF], _jpeg()[_HALF:])), None),
    ],
)
def test_compressed_pixels_are_read_by_their_codestream(data: bytes, named: str | None):
    film = load_radiograph(data)
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).mean() < 0.02 and film.chroma < 0.01
    assert [warning.split()[3] for warning in film.warnings] == ([named] if named else [])


@pytest.mark.parametrize("table", [b"", struct.pack("<LL", 0, 8 + len(_jpeg()))])
def test_two_compressed_frames_are_refused_whatever_the_header_says(table: bytes):
    with pytest.raises(RadiographError, match="has 2 frames"):
        load_radiograph(_compressed(_fragments(_jpeg(), _jpeg(), table=table), NumberOfFrames=1))


@pytest.mark.parametrize("frames", ["-1", "0"])
def test_an_invalid_number_of_frames_is_one(frames: str):
    film = load_radiograph(make_dicom(NumberOfFrames=frames))
    assert np.array_equal(film.pixels, load_radiograph(make_dicom()).pixels)
    assert len(film.warnings) == 1 and "NumberOfFrames" in film.warnings[0]


def test_colour_without_planar_configuration_is_interleaved():
    values = np.repeat(CHEST[..., None], 3, axis=2)
    data = make_dicom(PixelData=values.tobytes(), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    film = load_radiograph(data)
    assert np.array_equal(film.pixels, load_radiograph(make_dicom()).pixels)
    assert len(film.warnings) == 1 and "PlanarConfiguration" in film.warnings[0]


@pytest.mark.parametrize("attribute", ["VOILUTSequence", "ModalityLUTSequence"])
def test_the_bytes_of_a_lut_have_the_byte_order_of_the_file(attribute: str):
    film = []
    for order, syntax in (("<", ExplicitVRLittleEndian), (">", ExplicitVRBigEndian)):
        item = pydicom.Dataset()
        item.LUTDescriptor = [4096, 0, 16]
        item.add_new("LUTData", "OW", (np.arange(4096) ** 2 // 256).astype(f"{order}u2").tobytes())
        plain = pydicom.dcmread(io.BytesIO(make_dicom()))
        dataset, buffer = pydicom.Dataset(), io.BytesIO()
        dataset.update({element.tag: element for element in plain})
        dataset.file_meta, dataset.PixelData = plain.file_meta, CHEST.astype(f"{order}u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        setattr(dataset, attribute, [item])
        dataset.save_as(buffer, enforce_file_format=True)
        film.append(load_radiograph(buffer.getvalue()).pixels)
    assert np.array_equal(*film)
    assert np.abs(film[0] - stretch(CHEST.astype(np.int64) ** 2)).max() < 0.01


@pytest.mark.parametrize("orientation", [["R"], ["R", "F", "X"], ["", "F"], ["R", ""], ["L", "R"], "R/L", "RL", "RFH"])
def test_an_invalid_orientation_is_named(orientation: Any):
    film = load_radiograph(make_dicom(PatientOrientation=orientation, ViewPosition="PA"))
    assert np.array_equal(film.pixels, load_radiograph(make_dicom()).pixels)
    assert len(film.warnings) == 1 and "PatientOrientation" in film.warnings[0]


def test_a_presentation_lut_is_named():
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], np.arange(4096)[::-1].astype("<u2").tobytes()
    film = load_radiograph(make_dicom(PresentationLUTSequence=[item]))
    assert len(film.warnings) == 1 and "PresentationLUTSequence" in film.warnings[0]


def test_overlay_bits_above_the_stored_bits_are_masked():
    drawn = CHEST.copy()
    drawn[20:40, 20:120] |= 0x8000
    assert np.array_equal(load_radiograph(make_dicom(drawn)).pixels, load_radiograph(make_dicom()).pixels)


def test_a_short_or_narrow_voi_lut_is_used_as_far_as_it_goes():
    for data, bits in (
        (np.arange(4096).astype("<u2").tobytes()[:-64], 16),
        ((np.arange(4096) // 16).astype("u1").tobytes(), 8),
    ):
        item = pydicom.Dataset()
        item.LUTDescriptor, item.LUTData = [4096, 0, bits], data
        film = load_radiograph(make_dicom(VOILUTSequence=pydicom.Sequence([item])))
        assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 0.01


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_codestream_of_another_size_than_the_header_says_is_refused_before_it_is_decoded(kind: str):
    buffer = io.BytesIO()
    options = {"irreversible": False, "no_jp2": True} if kind == "JPEG2000" else {}
    Image.new("L", (4000, 4000)).save(buffer, kind, **options)
    syntax = pydicom.uid.JPEGBaseline8Bit if kind == "JPEG" else pydicom.uid.JPEG2000Lossless
    frames = pydicom.encaps.encapsulate([buffer.getvalue()])
    with pytest.raises(RadiographError, match="4,000 x 4,000 compressed pixels, but Columns and Rows are 200 x 240"):
        load_radiograph(make_dicom(draw_chest(3), syntax, PixelData=frames, BitsAllocated=8, BitsStored=8, HighBit=7))


def test_a_deflated_bomb_is_refused_with_little_memory():
    content = make_dicom(PixelData=bytes(200_000_000))
    start = 144 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(1, wbits=-15)
    explicit, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    head = content[:start].replace(
        len(explicit).to_bytes(2, "little") + explicit, len(deflated).to_bytes(2, "little") + deflated
    )
    head = head[:140] + (len(head) - 144).to_bytes(4, "little") + head[144:]
    with pytest.raises(RadiographError, match="deflated and has more than"):
        load_radiograph(head + packer.compress(content[start:]) + packer.flush())


def written(syntax: str, values: np.ndarray = CHEST) -> tuple[bytes, int]:
    """A file in an uncompressed transfer syntax, and where its data set begins."""
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(values, ViewPosition="LL")))
    dataset.file_meta.TransferSyntaxUID = uid = pydicom.uid.UID(syntax)
    little = uid.is_little_endian
    dataset.PixelData = values.astype("<u2" if little else ">u2").tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, implicit_vr=uid.is_implicit_VR, little_endian=little, force_encoding=True)
    content = file.getvalue()
    return content, 144 + int.from_bytes(content[140:144], "little")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("left_out", ["nothing", "preamble", "preamble and mark", "all meta information"])
def test_a_file_is_read_without_preamble_or_meta_information(syntax: str, left_out: str, tmp_path: Path):
    content, start = written(syntax)
    content = content[
        {"nothing": 0, "preamble": 128, "preamble and mark": 132, "all meta information": start}[left_out] :
    ]
    film = load_radiograph(content)
    assert np.array_equal(film.pixels, load_radiograph(make_dicom()).pixels)
    assert film.view == "lateral" and film.warnings == ()
    (tmp_path / "film").write_bytes(content)
    header = read_header(tmp_path / "film")
    assert header is not None and header.PatientName == "Secret^Name" and "PixelData" not in header


def test_a_message_over_the_network_is_read_as_it_was_recorded():
    command = struct.pack("<HHIIHHIH", 0, 0, 4, 10, 0, 0x100, 2, 1)
    content, start = written(ImplicitVRLittleEndian)
    assert np.array_equal(load_radiograph(command + content[start:]).pixels, load_radiograph(make_dicom()).pixels)


@pytest.mark.parametrize("content", [b"\x08\x00" + bytes(400), b"DICM" + bytes(400), b"\x02\x00" + bytes(range(256))])
def test_what_only_begins_like_a_dicom_file_is_refused(content: bytes):
    with pytest.raises(RadiographError) as caught:
        load_radiograph(content)
    assert "\n" not in str(caught.value)


SIGNED = CHEST.astype(np.int16) - 2000


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (SIGNED, {}),
        (SIGNED & 0x0FFF, {}),
        (SIGNED << 4, {"HighBit": 15}),
        ((SIGNED << 4) | 0x0009, {"HighBit": 15}),
        (SIGNED, {"BitsStored": 16, "HighBit": 15}),
        (SIGNED.astype(np.int32), {"BitsAllocated": 32}),
        (SIGNED.astype(np.int32) & 0x0FFF, {"BitsAllocated": 32}),
    ],
    ids=["extended", "zeros above", "shifted", "shifted with an overlay", "16 bits", "32 bits", "32 bits, zeros above"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_signed_values_are_read_by_their_stored_bits(values: np.ndarray, bits: dict, padded: bool):
    elements = {"PixelRepresentation": 1, "RescaleSlope": 2, "RescaleIntercept": -50, **bits}
    if padded:
        values = np.pad(values, 20, constant_values=int(values.min()) - 1)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(values, **elements)))
    if padded:
        dataset.add_new("PixelPaddingValue", "SS", int(values[0, 0]))
    file = io.BytesIO()
    dataset.save_as(file)
    film = load_radiograph(file.getvalue())
    assert np.abs(film.pixels - load_radiograph(make_dicom()).pixels).max() < 1e-5 and film.warnings == ()


def test_padding_is_found_among_signed_values_that_are_not_extended():
    values = np.pad(SIGNED & 0x0FFF, 20, constant_values=-2048 & 0x0FFF)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(values, PixelRepresentation=1)))
    dataset.add_new("PixelPaddingValue", "SS", -2048)
    file = io.BytesIO()
    dataset.save_as(file)
    assert np.array_equal(load_radiograph(file.getvalue()).pixels, load_radiograph(make_dicom()).pixels)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colour_is_read_by_its_luminance(photometric: str, planar: int):
    grey = draw_chest(3)
    colour = np.stack([grey, np.roll(grey, 9, 0), grey // 2], 2)
    stored = colour if photometric == "RGB" else np.asarray(Image.fromarray(colour).convert("YCbCr"))
    film = load_radiograph(
        make_dicom(
            grey,
            SamplesPerPixel=3,
            PhotometricInterpretation=photometric,
            PlanarConfiguration=planar,
            BitsAllocated=8,
            BitsStored=8,
            HighBit=7,
            PixelData=(stored.transpose(2, 0, 1) if planar else stored).tobytes(),
        )
    )
    assert np.abs(film.pixels - load_radiograph(colour).pixels).max() < 0.01
    assert film.chroma == pytest.approx(np.ptp(colour, axis=2).mean() / colour.max(), abs=0.01)


def test_a_dataset_in_memory_is_read_and_left_as_it_is():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(PhotometricInterpretation="monochrome1", ViewPosition="PA")))
    before = dataset.to_json()
    film = load_radiograph(dataset)
    assert film.view == "frontal" and dataset.to_json() == before
    assert np.allclose(film.pixels, load_radiograph(make_dicom(PhotometricInterpretation="MONOCHROME1")).pixels)


def test_pixel_data_of_a_dataset_may_be_a_file():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom()))
    wanted = load_radiograph(dataset)
    dataset.PixelData = file = io.BytesIO(dataset.PixelData)
    file.seek(100)
    film = load_radiograph(dataset)
    assert np.array_equal(film.pixels, wanted.pixels) and film.sha256 == wanted.sha256 and file.tell() == 100
    file.close()
    with pytest.raises(RadiographError, match="Pixel Data that cannot be read"):
        load_radiograph(dataset)


def test_pixel_data_of_a_dataset_may_be_a_bytearray():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom()))
    wanted = load_radiograph(dataset)
    dataset.PixelData = bytearray(dataset.PixelData)
    film = load_radiograph(dataset)
    assert np.array_equal(film.pixels, wanted.pixels) and film.sha256 == wanted.sha256


def test_no_thread_prints_header_values(capfd):
    content = make_dicom()
    content = content.replace(b"Secret^Name", b"Secret^\xff\xfe^Na"[:11]).replace(b"DX", b"DX", 1)
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings(record=True):
        list(pool.map(lambda _: load_radiograph(content), range(40)))
    captured = capfd.readouterr()
    assert "Secret" not in captured.out + captured.err


@pytest.mark.parametrize("attribute", [b"\x08\x00\x60\x00CS", b"\x10\x00\x10\x00PN", b"\x18\x00\x01\x51CS"])
def test_a_damaged_type_of_one_attribute_is_no_traceback(attribute: bytes, tmp_path: Path):
    content = (EXAMPLES / "chest_pa.dcm").read_bytes()
    assert attribute in content
    damaged = content.replace(attribute, attribute[:-1] + b"\0", 1)
    (tmp_path / "film.dcm").write_bytes(damaged)
    header = read_header(tmp_path / "film.dcm")
    assert header is not None and len([str(element) for element in header]) > 10
    film = load_radiograph(damaged)
    assert film.pixels.ndim == 2 and ("Modality" in " ".join(film.warnings)) == (attribute[:2] == b"\x08\x00")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damaged_dicom_file_breaks_it(data: st.DataObject):
    content = bytearray((EXAMPLES / "chest_pa.dcm").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):  # mostly where the header is
        most = data.draw(st.sampled_from([400, 3000, len(content) - 1]))
        content[data.draw(st.integers(0, most))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        radiograph = load_radiograph(bytes(content))
    except RadiographError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert radiograph.pixels.ndim == 2
