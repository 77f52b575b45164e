"""SR and FHIR of headers as hospitals send them: what is valid is copied, the rest left out and named."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import highdicom
import pydicom
import pytest
from conftest import EXAMPLES, needs_program
from pydicom.dataelem import DataElement
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from cbedge import RadiographError, Report
from cbedge.images.dicom import header_indication
from cbedge.images.dicom_file import read_header
from cbedge.images.dicom_header import study_header
from cbedge.images.dicom_pixels import Warnings
from cbedge.outputs import render
from cbedge.outputs.sr import to_sr
from cbedge.report import Sentence, Timings

DICOM = EXAMPLES / "chest_pa.dcm"
REPORT = Report(
    findings="The lungs are clear.",
    impression="No acute disease.",
    complete=True,
    text="FINDINGS: There is effusion. The lungs are clear. IMPRESSION: No acute disease.",
    model="m",
    model_version="1",
    variant="int4",
    device="cpu",
    view="frontal",
    indication_source=None,
    image_findings=("effusion", "opacity"),
    finding_scores={"effusion": 0.81, "opacity": 0.62, "scar": 0.1},
    image_sha256="a" * 64,
    prompt_tokens=1,
    sentences=(
        Sentence("There is effusion.", "findings", 0.81, False, "effusion"),
        Sentence("The lungs are clear.", "findings", 0.3, True),
    ),
    new_tokens=1,
    opening_tokens=0,
    guessed_tokens=0,
    accepted_tokens=0,
    passes=0,
    timings=Timings(1, 1, 1, 1, 1, 1),
    warnings=("The radiograph looks mirrored.",),
)

LEFT_OUT: dict[str, list[Any]] = {  # values that are not valid, a str as it stands in the file
    "PatientSex": ["U", "MF", "man", "M\\F", "X", "Ü", b"\xff", "M F", "F\n", "ｆ", "1", "unknown"],
    "PatientBirthDate": ["1940", "00000000", "1940-03-05", "19401305", "19400230", "20200101\\20200102", "?"],
    "PatientBirthTime": ["235960", "24"],
    "StudyDate": ["30000101", "2020-01-01", "20201301", "00010101", "99991231",
                  "99999999", "01/02/2020", "2020010", "202001011"],
    "StudyTime": ["12:30:11", "2530", "126000", "noon", "123011.1234567", "12 30", "-1", "235960"],
    "PatientName": ["A\\B", "A" * 65, "A^B^C^D^E^F", "A=B=C=D", "A\nB", b"M\xfcller", "^^^^"],
    "PatientID": ["A\\B", "9" * 65, "A\x1bB", b"\xe4\xf6", "1\t2"],
    "AccessionNumber": ["A\\B", "1" * 17, b"\xff\xfe"],
    "StudyID": ["1" * 17, "1\\2"],
    "ReferringPhysicianName": ["Who\\Else", "B" * 70],
    "StudyDescription": ["D" * 65, "THORAX\\PA", b"R\xf6ntgen"],
    "PatientAge": ["64", "64Y", "64y", "064yy", "064ÿ", "ABCD"],
    "SmokingStatus": ["maybe", "Y"],
    "TypeOfPatientID": ["TEXTS", "ﬁ"],
    "PatientWeight": ["heavy", "1e999", "70,5", "7" * 17],
    "PatientSize": ["1.80m", "NaN"],
    "SOPClassUID": ["", "not a UID", "1.2.3.", "1.2\\1.3", "3.1.2"],
    "Manufacturer": ["A\\B", "M" * 65],
}  # fmt: skip
ROOTS = ("0.0", "3.1.2", "1.40.1", "2.999.1")  # below which nobody may issue UIDs
REFUSED = [
    (name, value)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    for value in (None, "", "abc", "1.2.03", "1.2..3", "1.2.3.", "1." * 40 + "1", "1.2\\1.3", "1.2.x", *ROOTS)
]
COPIED: list[tuple[str, str, str]] = [  # attribute, as in the file, as in the document
    ("PatientSex", "O", "O"),
    ("PatientSex", "M ", "M"),
    ("PatientSex", "f", "F"),
    ("PatientSex", " m\0", "M"),
    ("PatientSex", "Female", "F"),
    ("PatientSex", "MALE ", "M"),
    ("PatientSex", " other", "O"),
    ("SmokingStatus", "yes", "YES"),
    ("TypeOfPatientID", "Barcode", "BARCODE"),
    ("PatientAge", "064y", "064Y"),
    ("PatientBirthDate", "20000229", "20000229"),
    ("StudyTime", "12", "12"),
    ("StudyTime", "123011.123456", "123011.123456"),
    ("PatientName", "O'Neill^Anne=X=Y", "O'Neill^Anne=X=Y"),
    ("PatientName", "B" * 64, "B" * 64),
    ("PatientID", " 12 ", "12"),
    ("SOPClassUID", "1.2.3.4", "1.2.3.4"),
    ("SeriesNumber", "x", ""),
    ("SeriesNumber", "-5", ""),
    ("SeriesNumber", "99999999999999", ""),
    ("SeriesNumber", "1\\2", ""),
    ("SpecificCharacterSet", "FOO", ""),
    ("SpecificCharacterSet", "ISO_IR_6", ""),
    ("SpecificCharacterSet", "\\ISO 2022 IR 87", ""),
    ("SpecificCharacterSet", "ISO 2022 IR 87\\FOO\\", ""),
]
WRONG_TYPE: list[tuple[str, str, Any]] = [
    ("PatientName", "UN", b"\xff\xff"),
    ("PatientID", "US", 7),
    ("PatientSex", "SQ", [pydicom.Dataset()]),
    ("PatientName", "SQ", [pydicom.Dataset()]),
    ("StudyDate", "OB", b"\0\1"),
    ("StudyTime", "FD", 1.5),
    ("PregnancyStatus", "LO", "4"),
    ("PregnancyStatus", "FD", 1.5),
    ("AccessionNumber", "SQ", [pydicom.Dataset()]),
    ("PatientBirthDate", "LO", "last year"),
    ("ProcedureCodeSequence", "LO", "chest"),
    ("ProcedureCodeSequence", "SQ", [pydicom.Dataset()]),
]
TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "SeriesNumber",
    "Modality",
)

_GREEK, _CYRILLIC, _THAI, _ARABIC, _HEBREW = "Διονυσιος", "Люкceмбypг", "สมชาย", "قباني", "שרון"
SINGLE = [
    ("13", "shift_jis", b")I", "ﾔﾏﾀﾞ"),
    ("100", "latin-1", b"-A", "Müller"),
    ("101", "iso8859-2", b"-B", "Wałęsa"),
    ("109", "iso8859-3", b"-C", "Ġorġ"),
    ("110", "iso8859-4", b"-D", "Jānis"),
    ("126", "iso8859-7", b"-F", _GREEK),
    ("127", "iso8859-6", b"-G", _ARABIC),
    ("138", "iso8859-8", b"-H", _HEBREW),
    ("144", "iso8859-5", b"-L", _CYRILLIC),
    ("148", "iso8859-9", b"-M", "Çağrı"),
    ("166", "tis-620", b"-T", _THAI),
    ("203", "iso8859-15", b"-b", "Œ€Žižek"),
]
NAMES = [
    ("ISO_IR 6", b"Doe^Jane", "Doe^Jane"),
    ("ISO 2022 IR 6", b"Doe^Jane", "Doe^Jane"),
    ("ISO_IR 192", "王^小東^🫁".encode(), "王^小東^🫁"),
    ("GB18030", "王^小东^㐀".encode("gb18030"), "王^小东^㐀"),
    ("GB18030", "俓^輁".encode("gb18030"), "俓^輁"),  # second bytes that are a backslash and a caret in ASCII
    ("GBK", "张^小东".encode("gbk"), "张^小东"),
    ("GBK", "誠^俓".encode("gbk"), "誠^俓"),
    *((f"ISO_IR {number}", text.encode(codec), text) for number, codec, _, text in SINGLE),
    *((f"ISO 2022 IR {number}", text.encode(codec), text) for number, codec, _, text in SINGLE),
    *(
        (f"\\ISO 2022 IR {number}", b"Doe^\x1b" + escape + text.encode(codec), f"Doe^{text}")
        for number, codec, escape, text in SINGLE
    ),
    (
        "\\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    (
        "ISO 2022 IR 13\\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
    ),
    ("\\ISO 2022 IR 159", "丂^丄".encode("iso2022_jp_2"), "丂^丄"),
    ("\\ISO 2022 IR 87\\ISO 2022 IR 159", "山丂".encode("iso2022_jp_2"), "山丂"),
    (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    ("\\ISO 2022 IR 58", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab", "Zhang^XiaoDong=张^小东"),
    ("ISO 2022 IR 100\\ISO 2022 IR 126", b"M\xfcller^\x1b-F" + _GREEK.encode("iso8859-7"), f"Müller^{_GREEK}"),
]


def header_bytes(changes: dict[str, Any], syntax: str = ImplicitVRLittleEndian) -> bytes:
    """The example's header with other values: text or bytes as they stand in the file, ``None`` for a missing one, or
    a pair of type and value."""
    dataset = _base()
    dataset.file_meta.TransferSyntaxUID = syntax
    for name, value in changes.items():
        tag = Tag(name)
        dataset.pop(tag, None)
        if name == "SpecificCharacterSet" and isinstance(value, str):
            dataset[tag] = DataElement(tag, "CS", value.split("\\"))
        elif isinstance(value, tuple):
            dataset[tag] = DataElement(tag, *value)
        elif value is not None:
            raw = value.encode() if isinstance(value, str) else value
            dataset[tag] = DataElement(tag, "OB", raw + b" " * (len(raw) % 2))
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=False, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    return file.getvalue()


@cache
def _example() -> bytes:
    dataset = pydicom.dcmread(DICOM, stop_before_pixels=True)
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    del dataset.SpecificCharacterSet
    file = io.BytesIO()
    dataset.save_as(file, implicit_vr=True, little_endian=True)
    return file.getvalue()


def _base() -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(_example()))


def document_of(content: bytes, tmp_path: Path) -> pydicom.Dataset:
    """The SR of a header, after highdicom and dicom3tools have found nothing wrong with it."""
    path = tmp_path / "draft.dcm"
    path.write_bytes(render(REPORT, "sr", content))
    document = pydicom.dcmread(path)
    assert highdicom.sr.EnhancedSR.from_dataset(document).content
    assert document.SpecificCharacterSet == "ISO_IR 192"
    for name in ("StudyInstanceUID",):
        assert document[name].value == _base()[name].value
    if shutil.which("dciodvfy"):  # the test below says where it is not
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace")
        assert not [line for line in done.stderr.splitlines() if line.startswith("Error")], done.stderr
    return document


def texts_of(document: pydicom.Dataset) -> list[str]:
    return [str(element.value) for element in document.iterall() if element.keyword == "TextValue"]


def left_out_of(document: pydicom.Dataset) -> set[str]:
    said = [text for text in texts_of(document) if text.startswith("Invalid attributes")]
    return {name.strip(" .") for text in said for name in text.split(":")[1].split(",")}


def reference_of(document: pydicom.Dataset) -> pydicom.Dataset:
    return document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]


@needs_program("dciodvfy", "dicom3tools")
def test_dicom3tools_checks_the_documents_of_this_file():
    assert sum(map(len, [*LEFT_OUT.values(), COPIED, WRONG_TYPE, TYPE_2, NAMES])) + len(REFUSED) > 88


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in LEFT_OUT.items() for v in values])
def test_a_value_that_is_not_valid_is_left_out_and_named(name: str, value: str | bytes, tmp_path: Path):
    document = document_of(header_bytes({name: value}), tmp_path)
    if name == "SOPClassUID":  # which a reference must name: that of the file's own meta information
        assert reference_of(document).ReferencedSOPClassUID == _base().file_meta.MediaStorageSOPClassUID
    elif name != "Manufacturer":  # the document's own
        assert not document.get(name)
    assert left_out_of(document) == {name}
    assert document.get("PatientSex" if name != "PatientSex" else "PatientID") in ("F", "9RG1")


@pytest.mark.parametrize(("name", "written", "expected"), COPIED)
def test_a_valid_value_is_copied(name: str, written: str, expected: str, tmp_path: Path):
    document = document_of(header_bytes({name: written}), tmp_path)
    if name == "SOPClassUID":
        assert reference_of(document).ReferencedSOPClassUID == expected
    elif expected:
        assert str(document[name].value) == expected
    assert document.PatientID and document.PatientName and not left_out_of(document)


@pytest.mark.parametrize(("name", "vr", "value"), WRONG_TYPE)
def test_a_value_of_the_wrong_type_is_left_out(name: str, vr: str, value: Any, tmp_path: Path):
    document = document_of(header_bytes({name: (vr, value)}, ExplicitVRLittleEndian), tmp_path)
    assert not document.get(name) and left_out_of(document) == {name}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("value", "copied"),
    [*((("US", number), number) for number in (1, 2, 3, 4)), *((("US", wrong), None) for wrong in (0, 5, [1, 2]))],
)
def test_a_binary_number_is_copied_as_a_number(syntax: str, value: tuple[str, Any], copied: int | None, tmp_path: Path):
    document = document_of(header_bytes({"PregnancyStatus": value}, syntax), tmp_path)
    assert document.get("PregnancyStatus") == copied
    assert left_out_of(document) == (set() if copied else {"PregnancyStatus"})


@pytest.mark.parametrize("value", [None, "", "  ", b"\0\0"])
@pytest.mark.parametrize("name", TYPE_2)
def test_a_missing_or_empty_attribute_is_empty_and_not_named(name: str, value: str | None, tmp_path: Path):
    document = document_of(header_bytes({name: value}), tmp_path)
    assert name in ("SeriesNumber", "Modality") or (name in document and not document[name].value)
    assert not left_out_of(document)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_study_or_image_that_cannot_be_identified_is_refused_by_name(name: str, value: str | None):
    with pytest.raises(RadiographError, match=name) as caught:
        render(REPORT, "sr", header_bytes({name: value}))
    assert "\n" not in str(caught.value) and (not value or value not in str(caught.value))


@pytest.mark.parametrize(("character_set", "written", "name"), NAMES)
def test_a_name_in_any_character_set_of_the_standard_stands_in_unicode(
    character_set: str, written: bytes, name: str, tmp_path: Path
):
    content = header_bytes({"SpecificCharacterSet": character_set, "PatientName": written})
    assert str(document_of(content, tmp_path).PatientName) == name


@pytest.mark.parametrize("character_set", ["ISO_IR 192", "\\ISO 2022 IR 149", "FOO", ""])
def test_a_name_that_does_not_decode_is_left_out(character_set: str, tmp_path: Path):
    content = header_bytes({"SpecificCharacterSet": character_set, "PatientName": b"M\xfcller^\xff\xc3"})
    document = document_of(content, tmp_path)
    assert not document.PatientName and left_out_of(document) == {"PatientName"}


@pytest.mark.parametrize(("modality", "kind"), [("CR", "1"), ("cr ", "1"), ("rg", "1"), ("dx", "1.1"), (None, "1.1")])
def test_a_modality_in_any_case_tells_a_missing_class(modality: str | None, kind: str):
    header = _base()
    header.Modality = modality
    del header.SOPClassUID, header.file_meta
    assert study_header(header).values.SOPClassUID == f"1.2.840.10008.5.1.4.1.1.{kind}"


def test_several_faults_at_once_are_all_named_and_the_rest_is_copied(tmp_path: Path):
    faults = {"PatientSex": "U", "StudyTime": "12:30:11", "PatientName": "A\\B"}
    document = document_of(header_bytes(faults), tmp_path)
    assert left_out_of(document) == set(faults)
    assert (document.PatientID, document.StudyDate) == ("9RG1", "20040826")
    said = " ".join(texts_of(document))
    assert "12:30:11" not in said and "A\\B" not in said


def test_codes_of_the_procedure_are_copied(tmp_path: Path):
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "36643-5", "LN", "XR Chest 2 Views"
    document = document_of(header_bytes({"ProcedureCodeSequence": ("SQ", [code])}), tmp_path)
    assert document.ProcedureCodeSequence[0].CodeValue == "36643-5"


def test_the_document_says_what_to_check_first(tmp_path: Path):
    document = document_of(header_bytes({}), tmp_path)
    said = texts_of(document)
    for note in REPORT.notes():
        assert note in said
    assert len(REPORT.notes()) == 4 and "Image scores point to: opacity" in said
    scores = [float(e.value) for e in document.iterall() if e.keyword == "NumericValue"]
    assert scores == [0.81, 0.62]


def test_fhir_says_what_to_check_first_and_the_scores():
    told = json.loads(render(REPORT, "fhir", header_bytes({"AccessionNumber": "A\\B"})))
    scores = next(c for c in told["contained"] if c["id"] == "image-scores")
    notes = [note["text"] for note in scores["note"]]
    assert notes[:4] == REPORT.notes() and "AccessionNumber" in notes[4]
    assert {c["code"]["text"]: c["valueQuantity"]["value"] for c in scores["component"]} == REPORT.finding_scores


@pytest.mark.parametrize("value", ["A\\B", b"\xff", "9" * 65])
@pytest.mark.parametrize("name", ["PatientID", "AccessionNumber", "StudyInstanceUID"])
def test_fhir_leaves_out_an_identifier_that_is_not_valid(name: str, value: str):
    text = render(REPORT, "fhir", header_bytes({name: value})).decode()
    told = json.loads(text)
    place = {"PatientID": "subject", "AccessionNumber": "identifier", "StudyInstanceUID": "imagingStudy"}
    assert place.pop(name) not in told and all(other in told for other in place.values())
    assert "['A'" not in text and "\ufffd" not in text


def test_fhir_holds_a_patient_id_in_its_character_set():
    content = header_bytes({"SpecificCharacterSet": "ISO_IR 144", "PatientID": _CYRILLIC.encode("iso8859-5")})
    told = json.loads(render(REPORT, "fhir", content))
    assert told["subject"]["identifier"]["value"] == _CYRILLIC


def test_the_same_draft_is_the_same_document_and_any_other_is_another():
    header, other_patient = read_header(header_bytes({})), read_header(header_bytes({"PatientID": "other"}))
    others = [
        {"image_sha256": "b" * 64},
        {"lateral_sha256": "c" * 64},
        {"text": "FINDINGS: Other."},
        {"findings": "Other."},
        {"impression": "Other."},
        {"template": "normal"},
        {"view": "lateral"},
        {"model": "n"},
        {"model_version": "2"},
        {"variant": "q4a8"},
        {"warnings": ()},
        {"sentences": ()},
        {"image_findings": ()},
        {"complete": False},
        {"finding_scores": {"effusion": 0.9, "opacity": 0.62}},
    ]

    def uid(report: Report, of: pydicom.Dataset | None = header) -> str:
        return pydicom.dcmread(io.BytesIO(to_sr(report, of, same_again=True))).SOPInstanceUID

    again = replace(REPORT, timings=Timings(9, 9, 9, 9, 9, 9), image_reused=True, reused_tokens=5)
    assert uid(REPORT) == uid(again) == uid(REPORT, read_header(header_bytes({})))
    uids = {uid(REPORT), uid(REPORT, other_patient), *(uid(replace(REPORT, **changes)) for changes in others)}
    assert len(uids) == len(others) + 2


@pytest.mark.parametrize("nothing", ["-", ".", "?", "n/a", "None", "XXXX", " ", "--", b"\xff\xff"])
def test_an_indication_that_says_nothing_gives_way_to_the_next(nothing: str | bytes):
    header = read_header(header_bytes({"ReasonForStudy": nothing, "RequestedProcedureDescription": "cough"}))
    assert header is not None and header_indication(header, Warnings()) == "cough"
    header = read_header(header_bytes({"ReasonForStudy": nothing}))
    assert header is not None and header_indication(header, Warnings()) is None


def test_a_file_without_the_preamble_has_a_header(tmp_path: Path):
    content = header_bytes({})
    (tmp_path / "bare").write_bytes(content[132:])
    for source in (content[132:], tmp_path / "bare"):
        assert document_of(source if isinstance(source, bytes) else source.read_bytes(), tmp_path).PatientID == "9RG1"
        header = read_header(source)
        assert header is not None and header.PatientID == "9RG1"
    assert read_header(b"\x89PNG\r\n\x1a\n" + bytes(200)) is None


def test_no_library_prints_a_name_of_one_component():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_sr_headers import REPORT, header_bytes, render;"
        "render(REPORT, 'sr', header_bytes({'PatientName': 'Secretname'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "Secretname" not in done.stdout + done.stderr
