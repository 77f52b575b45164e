import base64
import json
import subprocess
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from unittest.mock import Mock

import jsonschema
import pydicom
import pytest
from conftest import EXAMPLES, USUAL_VARIANT, call_cli, needs_program

from cbedge import DeviceError, OptionError, OutputError, RadiographError, Report, ReportGenerator
from cbedge.outputs import SCHEMA, check_format, render
from cbedge.outputs.sr import to_sr
from cbedge.report import DRAFT_STATEMENT, DraftToken, Sentence, split_sentences
from cbedge.services import batch
from cbedge.services.studies import Item

DICOM = EXAMPLES / "chest_pa.dcm"


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> Report:
    return ReportGenerator.from_pretrained(tiny_bundle, device="cpu").generate(DICOM, max_new_tokens=12)


def with_text(report: Report, findings: str, impression: str) -> Report:
    from dataclasses import replace

    return replace(report, findings=findings, impression=impression)


def test_json_follows_the_published_schema(report: Report):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(report.to_json()), schema)
    assert json.loads(call_cli("cbedge.cli", "schema").stdout) == schema


@pytest.fixture(scope="module")
def sr_file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sr") / "draft.dcm"
    path.write_bytes(render(with_text(report, "The lungs are clear. Ärzte ≥ 2 🫁.", "No acute disease."), "sr", DICOM))
    return path


def test_a_structured_report_is_a_draft_in_the_images_study(sr_file: Path):
    image, document = pydicom.dcmread(DICOM, stop_before_pixels=True), pydicom.dcmread(sr_file)
    assert document.Modality == "SR" and document.SOPClassUID.name == "Enhanced SR Storage"
    for name in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber"):
        assert document[name].value == image[name].value
    assert document.SeriesInstanceUID != image.SeriesInstanceUID
    assert (document.CompletionFlag, document.VerificationFlag, document.PreliminaryFlag) == (
        "PARTIAL",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    said = " ".join(e.value for e in document.iterall() if e.keyword == "TextValue")
    for words in (
        "The lungs are clear. Ärzte ≥ 2 🫁.",
        "No acute disease",
        f"tiny {USUAL_VARIANT}",
        "Unreviewed draft",
    ):
        assert words in said


@needs_program("dsrdump", "dcmtk")
def test_dcmtk_reads_the_structured_report(sr_file: Path):
    done = subprocess.run(["dsrdump", sr_file], capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    assert "No acute disease." in done.stdout and "Finding" in done.stdout and "E: " not in done.stderr


@needs_program("dciodvfy", "dicom3tools")
def test_dicom3tools_finds_no_error_in_the_structured_report(sr_file: Path):
    done = subprocess.run(["dciodvfy", sr_file], capture_output=True, text=True, errors="replace")
    assert not [line for line in done.stderr.splitlines() if line.startswith("Error")], done.stderr


def test_a_structured_report_needs_a_dicom_study(report: Report, chest_png: Path, tmp_path: Path):
    with pytest.raises(RadiographError, match="needs a study"):
        render(report, "sr", chest_png)
    header = pydicom.dcmread(DICOM, stop_before_pixels=True)
    del header.StudyInstanceUID
    with pytest.raises(RadiographError, match="lacks StudyInstanceUID"):
        to_sr(report, header)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError("secret"), RadiographError), (KeyError("secret"), RadiographError), (MemoryError(), DeviceError)],
)
def test_an_error_of_a_formats_library_is_of_that_draft_and_not_of_the_disk(
    raised: Exception, expected: type[Exception], report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*arguments: object) -> bytes:
        raise raised

    monkeypatch.setattr("cbedge.outputs.plain.write_text", fail)
    with pytest.raises(expected) as caught:
        render(report, "text")
    assert "secret" not in str(caught.value)
    documents = batch.Documents(tmp_path, "text")
    generator = Mock(ReportGenerator, **{"generate.return_value": report})
    line = batch.draft_item(Item("a", DICOM), generator, documents)
    assert line == {"status": "failed", "error": str(caught.value)}


def test_a_structured_report_without_a_study_is_refused_before_a_model_is_opened(chest_png: Path, tmp_path: Path):
    target = tmp_path / "draft.dcm"
    done = call_cli(
        "cbedge.cli", "generate", chest_png, "--model", tmp_path / "no-model", "--format", "sr", "-o", target
    )
    assert done.returncode == 3 and "needs a study" in done.stderr and not target.exists()


def test_fhir_is_a_preliminary_report_that_the_library_reads(report: Report):
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    told = json.loads(render(with_text(report, "Clear.", "Normal."), "fhir", DICOM))
    DiagnosticReport(**told)
    assert told["resourceType"] == "DiagnosticReport" and told["status"] == "preliminary"
    assert told["conclusion"] == "Normal." and told["subject"]["identifier"]["value"] == "9RG1"
    text = base64.b64decode(told["presentedForm"][0]["data"]).decode()
    assert DRAFT_STATEMENT in text
    assert {c["id"] for c in told["contained"]} == {"software", "findings", "impression", "image-scores"}
    scores = next(c for c in told["contained"] if c["id"] == "image-scores")
    assert {c["code"]["text"] for c in scores["component"]} == {*report.finding_scores}


def test_fhir_without_a_dicom_file_names_no_patient(report: Report, chest_png: Path):
    told = json.loads(render(report, "fhir", chest_png))
    assert "subject" not in told and "imagingStudy" not in told


@pytest.mark.parametrize(("form", "start"), [("sr", b"\0" * 128 + b"DICM"), ("fhir", b"{"), ("json", b"{")])
def test_the_command_writes_each_format(tiny_bundle: Path, tmp_path: Path, form: str, start: bytes):
    target = tmp_path / "out"
    given = ("--model", tiny_bundle, "--device", "cpu", "--max-new-tokens", 8)
    done = call_cli("cbedge.cli", "generate", DICOM, *given, "--format", form, "-o", target)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes().startswith(start)


def test_an_unknown_format_or_a_missing_library_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch):
    for name in (None, 7, ["text"]):
        with pytest.raises(OptionError, match=r"unknown format .*; give one of: text"):
            check_format(name)
    with pytest.raises(OptionError, match="unknown format 'xml'"):
        check_format("xml")
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(OutputError, match=r"cbedge\[hospital\]"):
        check_format("sr")


def test_what_the_image_scores_point_to_stands_beside_the_text(report: Report):
    scored = replace(
        report,
        image_findings=("opacity", "effusion"),
        finding_scores={"opacity": 0.6, "effusion": 0.4},
        finding_thresholds={"opacity": 0.5, "effusion": 0.3},
    )
    text = scored.to_text()
    scores = "opacity (score 0.60, threshold 0.50), effusion (score 0.40, threshold 0.30)."
    assert scores in text and text.index(scores) < text.index(report.statement)
    assert "Image scores" not in replace(report, image_findings=()).to_text()
    opened = replace(scored, sentences=(Sentence("There is opacity.", "findings", 0.6, False, "opacity"),)).to_text()
    assert "image scores (not probabilities), check first: opacity (score 0.60, threshold 0.50)." in opened
    assert "also point to: effusion (score 0.40, threshold 0.30)." in opened


def test_sentences_have_a_section_and_a_confidence():
    spoken = [
        ("FIND", 0.9),
        ("INGS:", 1.0),
        (" Heart", 0.5),
        (" normal", 0.5),
        (".", 0.5),
        (" Lungs clear.", 0.1),
        (" IMPRESSION:", 1.0),
        (" Normal", 1.0),
        (".", 1.0),
    ]
    spoken = [
        DraftToken("FINDINGS: There is", 0.4, "scar"),
        DraftToken(" scarring.", 0.4, "scar"),
        *starmap(DraftToken, spoken[2:]),
    ]
    zeroth, first, second, third = split_sentences(spoken)
    assert (zeroth.text, zeroth.finding, zeroth.low) == ("There is scarring.", "scar", False)  # a score
    assert zeroth.confidence == pytest.approx(0.4) and first.finding is None
    assert (first.text, first.section, second.text, third.section) == (
        "Heart normal.",
        "findings",
        "Lungs clear.",
        "impression",
    )
    assert second.low and second.confidence == pytest.approx(0.1) and not third.low and third.confidence == 1
    given = split_sentences(spoken, template=["Lungs clear."])[2]
    assert (given.source, given.low) == ("template", False) and given.confidence == pytest.approx(0.1)
    assert split_sentences([]) == ()


def test_a_sentence_in_both_sections_has_one_confidence_and_one_finding():
    spoken = [
        DraftToken("FINDINGS:", 1.0, "scar"),
        DraftToken(" There is scarring.", 0.3, "scar"),
        DraftToken(" IMPRESSION:", 1.0),
        DraftToken(" There is scarring.", 0.9),
        DraftToken(" Normal.", 0.8),
    ]
    first, again, other = split_sentences(spoken)
    assert (again.confidence, again.low, again.finding) == (first.confidence, first.low, first.finding)
    assert (again.section, again.finding, other.finding, other.low) == ("impression", "scar", None, False)


def test_an_indication_in_the_header_is_used_and_said(tiny_bundle: Path, tmp_path: Path):
    header = pydicom.dcmread(DICOM)
    header.ReasonForStudy = "cough and fever"
    header.save_as(tmp_path / "asked.dcm")
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    told, given, none = (
        generator.generate(image, indication=words, max_new_tokens=2)
        for image, words in ((tmp_path / "asked.dcm", None), (tmp_path / "asked.dcm", "pain"), (DICOM, None))
    )
    assert (told.indication_source, given.indication_source, none.indication_source) == ("DICOM header", "given", None)
    assert told.prompt_tokens > none.prompt_tokens
