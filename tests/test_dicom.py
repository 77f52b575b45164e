import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import EXAMPLES, draw_chest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from cbedge import RadiographError, load_radiograph
from cbedge.dicom import read_header

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


@pytest.mark.skipif(shutil.which("dcmcjpls") is None, reason="dcmtk, which writes JPEG-LS, is not installed")
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
        ({"SamplesPerPixel": 3}, "3 colour channels"),
        ({"Rows": 20_000, "Columns": 20_000}, "at most 100,000,000"),
        ({"PixelData": b"\0" * 100}, "damaged or cut short"),
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


def test_lateral_is_read_from_the_header():
    film = load_radiograph(make_dicom(ViewPosition="LL", StudyInstanceUID="1.2.3"))
    assert film.view == "lateral" and film.study_uid == "1.2.3"
    assert load_radiograph(make_dicom(ViewPosition="ODD")).view is None


@pytest.mark.parametrize("attribute", [b"\x08\x00\x60\x00CS", b"\x10\x00\x10\x00PN", b"\x18\x00\x01\x51CS"])
def test_a_damaged_type_of_one_attribute_is_no_traceback(attribute: bytes, tmp_path: Path):
    content = (EXAMPLES / "chest_pa.dcm").read_bytes()
    assert attribute in content
    damaged = content.replace(attribute, attribute[:-1] + b"\0", 1)
    (tmp_path / "film.dcm").write_bytes(damaged)
    header = read_header(tmp_path / "film.dcm")
    assert header is not None and len([str(element) for element in header]) > 10
    if attribute[:2] == b"\x08\x00":  # without its modality it is refused
        with pytest.raises(RadiographError, match="modality none"):
            load_radiograph(damaged)
    else:
        assert load_radiograph(damaged).pixels.ndim == 2


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
