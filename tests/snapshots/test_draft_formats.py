"""One draft of the embedded model in every output format. Placeholders stand for what runs or processors differ in."""

import base64
import io
import json
import re
from collections.abc import Iterator

import pydicom
import pytest
from conftest import EXAMPLES, needs_default_model
from golden.drafts import FOLDER, TEMPLATE
from syrupy.assertion import SnapshotAssertion

from cbedge import Report, ReportGenerator
from cbedge.outputs import FORMATS, render

FILM = FOLDER / "films" / "00003523_013.jpg"  # with findings that are opened, only pointed to, and absent
DICOM = EXAMPLES / "chest_pa.dcm"
DRAFTS = {"plain": {}, "template": {"template": TEMPLATE}}
SPEED = ("guessed_tokens", "accepted_tokens", "passes")  # they follow from how fast the machine is

pytestmark = needs_default_model


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    generator = ReportGenerator.from_pretrained(variant="int4", device="cpu")
    return {name: generator.generate(FILM, indication="cough", **options) for name, options in DRAFTS.items()}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_draft_looks_as_it_did(form: str, draft: str, reports: dict[str, Report], snapshot: SnapshotAssertion):
    report = reports[draft]
    content = render(report, form, DICOM)
    text = "\n".join(sr_lines(content)) + "\n" if form == "sr" else content.decode()
    if form == "fhir":
        (attached,) = json.loads(text)["presentedForm"]
        assert base64.b64decode(attached["data"]).decode() == report.to_text()
        text = text.replace(attached["data"], "<the text in base64>")
    assert without_noise(text, report) == snapshot


def without_noise(text: str, report: Report) -> str:
    """The text with placeholders for scores, timings, hashes, the time of writing and the model's version."""
    text = text.replace(report.model_version, "<version>")
    text = re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", text)
    text = re.sub(rf'("(?:{"|".join(SPEED)})"): \d+', r"\1: <count>", text)
    text = re.sub(r'("issued"): "[^"]+"', r'\1: "<time>"', text)
    return re.sub(r"(?<![\d.])\d+\.\d+(?![\d.])", "<number>", text)


def sr_lines(content: bytes) -> Iterator[str]:
    """A DICOM document, one attribute a line; placeholders for UIDs, times and versions that are not the image's."""
    image = {str(element.value) for element in pydicom.dcmread(DICOM, stop_before_pixels=True).iterall()}
    document = pydicom.dcmread(io.BytesIO(content))

    def lines(dataset: pydicom.Dataset, indent: str) -> Iterator[str]:
        for element in dataset:
            name = f"{indent}{element.tag} {element.keyword} {element.VR}"
            if element.VR == "SQ" and [*map(len, element.value)] == [3] and "CodeMeaning" in element.value[0]:
                code = element.value[0]
                yield f"{name}: {code.CodeValue}, {code.CodingSchemeDesignator}, {code.CodeMeaning}"
            elif element.VR == "SQ":
                yield name
                for number, item in enumerate(element.value, 1):
                    yield f"{indent}  item {number}"
                    yield from lines(item, indent + "    ")
            else:
                yield f"{name}: {shown(element)}"

    def shown(element: pydicom.DataElement) -> str:
        value = str(element.value)
        if element.VR == "UI" and pydicom.uid.UID(value).name == value and value not in image:
            return "<uid>"
        if element.VR in ("DA", "TM", "DT") and value not in image:
            return "<time>"
        return "<version>" if element.keyword == "SoftwareVersions" and value not in image else value

    return lines(document, "")
