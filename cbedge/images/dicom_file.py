"""Parse DICOM files, with or without preamble and file meta information, also deflated; only the used elements.

pydicom keeps every element of a file, creates an object for each part of a header, and inflates without a limit, so a
file of a few megabytes can need gigabytes of memory. Here pydicom gets only the used elements, with limits on their
size and number.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cbedge.errors import RadiographError
from cbedge.images.dicom_header import COPIED, UNREADABLE
from cbedge.images.file_type import MARK, is_dicom
from cbedge.images.memory import MAX_BYTES, PartedFile

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

_LATIN = ("latin_1", "iso8859_2", "iso8859_3", "iso8859_4", "iso8859_9")
INDICATIONS = (
    "ReasonForStudy",
    "ReasonForTheRequestedProcedure",
    "RequestedProcedureDescription",
    "AdmittingDiagnosesDescription",
)
_SEQUENCES = (
    "ModalityLUTSequence",
    "VOILUTSequence",
    "PresentationLUTSequence",
    "ViewCodeSequence",
    "ProcedureCodeSequence",
    "AdmittingDiagnosesCodeSequence",
    "AnatomicRegionSequence",
)
_FILE = ("SpecificCharacterSet", "TransferSyntaxUID", "MediaStorageSOPClassUID", "SeriesNumber", "Modality")
_VIEW = ("BodyPartExamined", "ViewPosition", "PatientOrientation")
_SIZE = ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration")
_DEPTH = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_EDGES = (
    "ShutterLeftVerticalEdge",
    "ShutterRightVerticalEdge",
    "ShutterUpperHorizontalEdge",
    "ShutterLowerHorizontalEdge",
)
_SHUTTER = ("ShutterShape", "CenterOfCircularShutter", "RadiusOfCircularShutter", "VerticesOfThePolygonalShutter")
_DISPLAY = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape")
_PIXELS = (*_SIZE, *_DEPTH, *_PADDING, *_EDGES, *_SHUTTER, *_DISPLAY, "PixelData")
_USED = (*COPIED, *INDICATIONS, *_SEQUENCES, *_FILE, *_VIEW, *_PIXELS)
_OVERLAY_BIT_POSITIONS = tuple(0x60000102 + 0x20000 * i for i in range(16))
_PIXEL_DATA, _UNDEFINED = 0x7FE00010, 0xFFFFFFFF
_MAX_VALUE, _MAX_SEQUENCE = 2**16, 2**22  # bytes of one attribute
_MAX_READS = 200_000  # read calls: two or three for each element, sequence item and fragment
_DEFLATED = "1.2.840.10008.1.2.1.99"
_TEXT = ("PN", "LO", "SH", "ST", "LT", "UC", "UT")
_GB2312 = b"\x1b$)A"


def silence_pydicom() -> None:
    """Permanently stop pydicom and highdicom from printing header values, which are patient data, in all threads.

    ``warnings.catch_warnings`` is not used because it is not thread-safe.
    """
    from pydicom import charset

    for library in ("pydicom", "highdicom"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # Latin-9 has been in the standard since 2018 and is missing in pydicom 3.0.
    charset.python_encoding.setdefault("ISO_IR 203", "iso8859_15")
    charset.python_encoding.setdefault("ISO 2022 IR 203", "iso8859_15")
    charset.CODES_TO_ENCODINGS.setdefault(charset.ESC + b"-b", "iso8859_15")


def parse_dicom(file: IO[bytes], name: str, pixels: bool = True) -> Dataset:
    """Parse the elements of a DICOM file that cbedge uses, with or without Pixel Data, and its ``file_meta``.

    Messages call the file ``name``.

    Raises:
        RadiographError: it is not a DICOM file, is damaged, or has too large or too many elements.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    silence_pydicom()
    try:
        start = file.read(132)
        file.seek(132 if start[128:] == MARK else 4 if start[:4] == MARK else 0)
        parts = PartedFile(file, name, _MAX_READS)
        meta = FileMetaDataset(_elements(parts, name, False, True, group=2))
        syntax = str(meta.get("TransferSyntaxUID") or "").strip(" \0")
        if syntax == _DEFLATED:
            parts, syntax = parts.within(_inflated(file.read(MAX_BYTES), name)), ExplicitVRLittleEndian
        _elements(parts, name, True, True, group=0)  # of a message over the network
        if not syntax:
            first = parts.read(6)
            parts.seek(-len(first), io.SEEK_CUR)
            explicit = ExplicitVRLittleEndian if first[:1] != b"\0" else ExplicitVRBigEndian
            syntax = explicit if first[4:].isalpha() and first[4:].isupper() else ImplicitVRLittleEndian
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        dataset = _elements(parts, name, implicit, little, pixels=pixels)
        meta.TransferSyntaxUID = UID(syntax)
        dataset.file_meta = meta
    except RadiographError:
        raise
    except Exception:
        raise RadiographError(f"{name} cannot be read as a DICOM file: export it again") from None
    if not dataset:  # pydicom drops all elements of a file that ends within one
        raise RadiographError(f"{name} is truncated or has no radiograph: export it again")
    return dataset


def read_header(source: Path | bytes | None, needed: bool = True) -> Dataset | None:
    """Read the header elements that cbedge uses from a file or its bytes, without pixels.

    A value whose bytes cannot be decoded is replaced by the text :data:`cbedge.images.dicom_header.UNREADABLE`. The
    result is ``None`` without a source, or if it is not a DICOM file, or cannot be read and is not ``needed``.

    Raises:
        RadiographError: ``needed`` is true and the DICOM file cannot be read.
    """
    if source is None:
        return None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            if not is_dicom(file.read(132)):
                return None
            file.seek(0)
            return decodable(parse_dicom(file, "the radiograph", pixels=False))
    except Exception:
        if needed:
            raise RadiographError("the DICOM header cannot be read: export the radiograph again") from None
        return None


@cache
def _used_tags() -> tuple[frozenset[int], frozenset[int]]:
    """Tags of the used elements, and those of them that are sequences."""
    from pydicom.datadict import tag_for_keyword

    tags = [frozenset(tag for name in names if (tag := tag_for_keyword(name))) for names in (_USED, _SEQUENCES)]
    return tags[0] | frozenset(_OVERLAY_BIT_POSITIONS), tags[1]


def _elements(
    parts: PartedFile, name: str, implicit: bool, little: bool, group: int | None = None, pixels: bool = True
) -> Dataset:
    """Read the used elements of one group or of all, with or without Pixel Data."""
    from pydicom.datadict import keyword_for_tag
    from pydicom.filereader import read_dataset

    used, sequences = _used_tags()

    def ends(tag: BaseTag, vr: str | None, length: int) -> bool:
        if (group is not None and tag >> 16 != group) or (tag == _PIXEL_DATA and not pixels):
            return True
        most = _MAX_SEQUENCE if tag in sequences else _MAX_VALUE
        if tag in used and tag != _PIXEL_DATA and most < length < _UNDEFINED:
            raise RadiographError(
                f"{name} has {length:,} bytes in the attribute {keyword_for_tag(tag)}; the limit is {most:,}: "
                "export it again"
            )
        return False

    dataset = read_dataset(parts, implicit, little, stop_when=ends, specific_tags=[*used])  # type: ignore[arg-type]
    for tag in sequences:
        _part(dataset, tag, parts)
    return dataset


def _part(dataset: Dataset, tag: int, parts: PartedFile) -> None:
    """Parse a sequence with a limit; pydicom would parse it on access, without one."""
    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.filereader import read_sequence

    raw = dataset.get_item(tag) if tag in dataset else None
    if not isinstance(raw, RawDataElement):
        return
    value = raw.value or b""
    try:
        items = read_sequence(
            parts.within(value), raw.is_implicit_VR, raw.is_little_endian, len(value), dataset._character_set
        )
        dataset[tag] = DataElement(tag, "SQ", items)
    except Exception:  # pydicom raises various exceptions for damaged sequences
        dataset[tag] = DataElement(tag, "LO", UNREADABLE)


def _inflated(data: bytes, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data, MAX_BYTES)
    if not inflater.eof and inflater.decompress(inflater.unconsumed_tail, 1):
        raise RadiographError(f"{name} is deflated and has more than {MAX_BYTES:,} bytes: export it uncompressed")
    return content


def decodable(dataset: Dataset) -> Dataset:
    """Replace every value that cannot be decoded by :data:`UNREADABLE`, in place.

    pydicom decodes an element on access and raises various exceptions for damaged bytes. It reads non-ASCII bytes
    without a declared character set as Latin-1, which would be a guess, and leaves the escape sequence of ISO 2022 IR
    58 in the text. Text in UTF-8 under the name of a Latin character set would be garbled.
    """
    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.valuerep import PersonName

    encoding = _first_encoding(dataset)
    for tag in [*dataset.keys()]:
        try:
            raw = dataset.get_item(tag)
            element = dataset[tag]
            if element.VR not in _TEXT or not isinstance(raw, RawDataElement) or raw.value is None:
                continue
            unnamed = encoding is None and _is_unnamed(raw.value, element.VR)
            if not unnamed and not (encoding in _LATIN and _is_utf8(raw.value)):
                if _GB2312 in raw.value and isinstance(element.value, str | PersonName):
                    text = str(element.value).replace(_GB2312.decode(), "")
                    dataset[tag] = DataElement(tag, element.VR, text)
                continue
        except Exception:
            pass
        dataset[tag] = DataElement(tag, "LO", UNREADABLE)
    return dataset


def _first_encoding(dataset: Dataset) -> str | None:
    """Python's name of the first character set; ``None`` if it is missing or unknown, so that text must be ASCII."""
    from pydicom.charset import convert_encodings, default_encoding

    try:
        named = dataset.get("SpecificCharacterSet") or ""
        names = [named] if isinstance(named, str) else [str(name) for name in named]
        encoding = convert_encodings(names)[0]
    except Exception:
        return None
    return None if encoding == default_encoding else encoding


def _is_utf8(raw: bytes) -> bool:
    """Whether bytes are UTF-8 beyond ASCII, which text in a Latin character set practically never is."""
    try:
        return not raw.isascii() and bool(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _is_unnamed(raw: bytes, vr: str) -> bool:
    """Whether there are non-ASCII bytes without an escape sequence for their character set; delimiters reset it."""
    parts = re.split(rb"[\\\r\n\t\f^=]" if vr == "PN" else rb"[\\\r\n\t\f]", raw)
    return any(not part.partition(b"\x1b")[0].isascii() for part in parts)
