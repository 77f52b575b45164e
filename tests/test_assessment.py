"""What the model does not assess: it opens no draft, and every output shows which sentences speak of it."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jsonschema
import pydicom
import pytest
from conftest import EXAMPLES, call_cli, needs_default_model
from fastapi.testclient import TestClient
from golden.drafts import FOLDER

from cbedge import ReportGenerator
from cbedge.drafting.assertions import may_concern, stated_by
from cbedge.drafting.assessment import Assessment
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.errors import OptionError
from cbedge.findings.image_findings import OTHER, ImageFindings, Measured, Standing
from cbedge.outputs import SCHEMA, render
from cbedge.report import DraftToken, Report, Sentence
from cbedge.services.dicom_node import Listener, ListenSettings
from cbedge.services.http import create_app

GOOD, POOR = Measured(0.85, 0.80, 0.90, 300, 30), Measured(0.72, 0.62, 0.80, 300, 30)
FILMS = [*sorted((FOLDER / "films").glob("*.jpg"))[:5], EXAMPLES / "chest_pa.png"]
LEGEND = "* This model does not assess what the sentence says: check the image."
NORMAL = "FINDINGS: The heart is normal. The lungs are clear. No pneumothorax. IMPRESSION: No acute disease."


def standings(findings: ImageFindings, unassessed: tuple[str, ...]) -> ImageFindings:
    """The same findings, some of them with a poor result on films of another hospital."""
    return replace(
        findings, standings=tuple(Standing(GOOD, POOR if name in unassessed else GOOD) for name in findings.names)
    )


@pytest.fixture
def generator() -> ReportGenerator:
    return ReportGenerator.from_pretrained(variant="int4", device="cpu")


def without_assessing(generator: ReportGenerator, *names: str) -> ReportGenerator:
    """The generator, with a manifest that was read now and in which some findings are not assessed."""
    manifest = generator.bundle.manifest
    assert manifest.image_findings is not None
    unprompted = {*manifest.image_findings.names} - {*manifest.image_findings.head.names}  # the same in every test
    changed = replace(manifest, image_findings=standings(manifest.image_findings, (*names, *unprompted)))
    generator.bundle = replace(generator.bundle, manifest=changed)
    return generator


FINDINGS = standings(
    ImageFindings(("abnormal", "hyperinflation", "low volume", "effusion"), (0.5, 0.3, 0.3, 0.3)), ("low volume",)
)


@pytest.mark.parametrize(
    ("scores", "present", "above"),
    [
        ((0.9, 0.4, 0.9, 0.4), ("hyperinflation", "effusion"), ("low volume",)),  # it excludes no assessed finding
        ((0.9, 0.1, 0.9, 0.1), (OTHER,), ("low volume",)),
        ((0.4, 0.4, 0.9, 0.9), (), ("low volume",)),
        ((0.9, 0.1, 0.1, 0.1), (OTHER,), ()),
    ],
)
def test_an_unassessed_finding_is_never_present(
    scores: tuple[float, ...], present: tuple[str, ...], above: tuple[str, ...]
):
    unassessed = FINDINGS.unassessed()
    assert unassessed == ("low volume",)
    assert FINDINGS.read(scores, unassessed) == present
    assert FINDINGS.above(scores, unassessed) == above


def test_an_unassessed_abnormal_score_names_no_other_abnormality():
    findings = standings(FINDINGS, ("abnormal",))
    assert findings.read((0.9, 0.1, 0.1, 0.1), findings.unassessed()) == ()
    assert findings.read((0.9, 0.1, 0.1, 0.9), findings.unassessed()) == ("effusion",)


ALL = ("cardiomegaly", "effusion", "nodule", "pneumothorax", "consolidation", "edema", "pleural thickening", "hernia")


@pytest.mark.parametrize(
    ("sentence", "findings"),
    [
        ("Normal chest.", ALL),
        ("No acute disease.", ALL),
        ("No acute cardiopulmonary abnormality.", ALL),
        ("Unremarkable.", ALL),
        ("The lungs are clear.", ("nodule", "pneumothorax", "consolidation", "edema")),
        ("Lungs: Clear", ("nodule", "pneumothorax", "consolidation", "edema")),
        ("No pneumothorax.", ("pneumothorax",)),
        ("There is no pneumothorax or pleural effusion.", ("effusion", "pneumothorax")),
        ("Large effusion without pneumothorax.", ("effusion", "pneumothorax")),
        ("There is consolidation.", ("consolidation",)),
        ("Hiatal hernia.", ("hernia",)),
        ("No hiatus hernia.", ("hernia",)),
        ("Interstitial edema.", ("edema",)),
        ("No apical thickening.", ("pleural thickening",)),
        ("The heart is normal in size.", ("cardiomegaly",)),
        ("CTR 48%.", ("cardiomegaly",)),
        ("Both costophrenic angles are sharp.", ("effusion", "pleural thickening")),
        ("The trachea is midline.", ()),
        ("There are no acute bony findings.", ()),
        ("There is airspace opacity.", ()),
        ("The aorta is tortuous.", ()),
        ("Two views of the chest.", ()),
    ],
)
def test_which_findings_a_sentence_may_state_or_deny(sentence: str, findings: tuple[str, ...]):
    assert tuple(name for name in ALL if may_concern(sentence, name)) == findings


def test_a_finding_that_the_package_does_not_know_has_the_words_of_its_name():
    assert may_concern("There is no pulmonary whatnot.", "whatnot")
    assert not may_concern("The heart is normal.", "whatnot")
    assert may_concern("Normal chest.", "whatnot")


def test_the_manifests_denials_count_as_well():
    assessment = Assessment({"whatnot": (r"\bserene\b",)})
    assert assessment.findings_of("The hila are serene.") == ("whatnot",)
    assert assessment.findings_of("The hila are normal.") == ()


def shown(assessment: Assessment, *sentences: str) -> tuple[str, SentenceFilter]:
    """A draft of some sentences and headings, one token each, as it is shown."""
    check = SentenceFilter(fixed=[text for text in sentences if not text.endswith(":")], assessment=assessment)
    tokens = [token for text in sentences for token in check.add(DraftToken(f" {text}", 0.9))]
    return "".join(token.piece for token in [*tokens, *check.end()]).strip(), check


DRAFT = ("FINDINGS:", "The heart is normal.", "No pneumothorax.", "IMPRESSION:", "Normal heart.", "No acute disease.")


def test_sentences_are_marked_or_left_out_and_counted():
    marked, check = shown(Assessment({"pneumothorax": ()}), *DRAFT)
    assert marked == ("FINDINGS: The heart is normal. No pneumothorax.* IMPRESSION: Normal heart. No acute disease.*")
    assert check.left_out == (set(), set())
    omitted, check = shown(Assessment({"pneumothorax": ()}, shown_as="omit"), *DRAFT)
    assert omitted == "FINDINGS: The heart is normal. IMPRESSION: Normal heart."
    assert check.left_out == ({"no pneumothorax"}, {"no acute disease"})
    plain, _ = shown(Assessment({"pneumothorax": ()}, shown_as="plain"), *DRAFT)
    assert plain == " ".join(DRAFT)


def test_a_denial_of_a_high_score_is_marked_whatever_was_chosen():
    against, _ = shown(Assessment({"pneumothorax": (), "nodule": ()}, ("pneumothorax",), shown_as="plain"), *DRAFT)
    assert against == "FINDINGS: The heart is normal. No pneumothorax.* IMPRESSION: Normal heart. No acute disease.*"
    other, _ = shown(Assessment({"pneumothorax": (), "nodule": ()}, ("nodule",), shown_as="plain"), *DRAFT[:4])
    assert other == "FINDINGS: The heart is normal. No pneumothorax."


def test_a_section_of_which_nothing_is_left_says_so():
    text, check = shown(Assessment({"cardiomegaly": (), "pneumothorax": ()}, shown_as="omit"), *DRAFT[:5])
    assert text == "FINDINGS: Left out: this model does not assess it."
    assert [len(sentences) for sentences in check.left_out] == [2, 1]


def test_opening_sentences_are_assessed_and_other_languages_are_not():
    assessment = Assessment(
        {"consolidation": ()}, openings=frozenset({"there is consolidation"}), foreign=frozenset({"herz normal"})
    )
    labelled = [
        assessment.label(Sentence(text, "findings", 0.9, False))
        for text in ("There is consolidation.", "Herz normal.", "No consolidation.", "The heart is normal.")
    ]
    assert [(one.assessed, one.unassessed, one.marked) for one in labelled] == [
        (True, (), False),
        (False, ("consolidation",), True),
        (False, ("consolidation",), True),
        (True, (), False),
    ]


POINTS = {"sensitive": (0.2, 0.1), "balanced": (0.5, 0.3)}


@pytest.mark.parametrize(
    ("scores", "uncertain"),
    [
        ((0.1, 0.05), ()),  # ruled out
        ((0.3, 0.05), ("abnormal",)),
        ((0.6, 0.2), ("effusion",)),  # abnormal is stated
        ((0.6, 0.4), ()),  # both are
        ((0.3, 0.4), ("abnormal", "effusion")),  # nothing is stated of a study that is scored normal
    ],
)
def test_a_score_between_two_operating_points_rules_nothing_out(scores: tuple[float, ...], uncertain: tuple[str, ...]):
    findings = ImageFindings(("abnormal", "effusion"), POINTS["balanced"], operating_points=POINTS)
    present = findings.read(scores)
    assert findings.uncertain(scores, present, ()) == uncertain
    assert findings.uncertain(scores, present, ("effusion",)) == tuple(n for n in uncertain if n != "effusion")
    assert replace(findings, operating_points={}).uncertain(scores, present, ()) == ()


def test_a_denial_of_an_uncertain_finding_is_marked(generator: ReportGenerator):
    """An effusion too likely to be ruled out and too unlikely to be stated: the threshold lies above every score."""
    manifest = generator.bundle.manifest
    at = manifest.image_findings.names.index("effusion")
    thresholds = tuple(0.99 if i == at else t for i, t in enumerate(manifest.image_findings.thresholds))
    findings = replace(manifest.image_findings, thresholds=thresholds)
    template = "FINDINGS: The trachea is midline. No pleural effusion. IMPRESSION: Follow-up as needed."
    stated = generator.generate(EXAMPLES / "nih" / "effusion.jpg", template=template)
    assert "effusion" in stated.image_findings and "effusion" not in stated.uncertain
    generator.bundle = replace(generator.bundle, manifest=replace(manifest, image_findings=findings))
    report = generator.generate(EXAMPLES / "nih" / "effusion.jpg", template=template)
    denial = next(s for s in report.sentences if s.text == "No pleural effusion.")
    assert report.uncertain[0] == "effusion" and "effusion" not in report.unassessed
    assert denial.marked and not denial.assessed and "effusion" in denial.unassessed
    assert "No pleural effusion.*" in report.text
    assert any(note.startswith("Uncertain, so marked: effusion (probability") for note in report.notes())


def test_an_unknown_way_to_show_them_is_refused(tiny_bundle: Path, chest_png: Path):
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    for value in ("hide", None, ""):
        with pytest.raises(OptionError, match="give mark, omit or plain"):
            generator.generate(chest_png, unassessed=value)


SPEAKS = re.compile(
    r"pneumothora|nodul|\bmass|consolidation|edema|granuloma|normal chest|clear|no (acute|active)(?! bony)|disease",
    re.I,
)


def not_assessed(report: Report) -> list[str]:
    """The sentences that are not assessed, among them those whose words, read without the package, say so."""
    found = [sentence.text for sentence in report.sentences if not sentence.assessed]
    assert {s.text for s in report.sentences if s.basis != "image" and SPEAKS.search(s.text)} <= {*found}
    return found


@needs_default_model
@pytest.mark.parametrize("film", FILMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("names", [("abnormal",), ("scar", "device", "opacity"), ("effusion", "aorta", "low volume")])
def test_no_output_denies_an_unassessed_finding_without_a_mark(
    film: Path, names: tuple[str, ...], generator: ReportGenerator
):
    without_assessing(generator, *names)
    stream = generator.stream(film, indication="cough", accept_any_image=True)
    pieces = "".join(stream)
    report = stream.report
    assert pieces.strip() == report.text
    assert {*names, "pneumothorax", "nodule"} <= {*report.unassessed}
    assert not {*names} & {*(report.image_findings or ())}
    assert not {*names} & {sentence.finding for sentence in report.sentences}
    unsure = not_assessed(report)
    text = render(report, "text").decode()
    values = json.loads(render(report, "json"))
    fhir = json.loads(render(report, "fhir"))
    presented = base64.b64decode(fhir["presentedForm"][0]["data"]).decode()
    sections = "".join(part.get("valueString", "") for part in fhir["contained"])
    for sentence in unsure:
        for shown in (text, values["text"], presented, sections, fhir["conclusion"] + sections):
            assert shown.count(sentence) == shown.count(f"{sentence}*") > 0
    for shown in (text, presented):
        assert (f"[{LEGEND}]" in shown) == bool(unsure)
        assert f"[Not assessed: {', '.join(report.unassessed)}.]" in shown
    notes = [note["text"] for part in fhir["contained"] for note in part.get("note", [])]
    assert (LEGEND in notes) == bool(unsure)
    assert {f"Not assessed by the model: {sentence}" for sentence in unsure} <= {*notes}
    jsonschema.validate(values, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert [(s["assessed"], s["marked"], s["text"]) for s in values["sentences"]] == [
        (s.text not in unsure, s.text in unsure, s.text) for s in report.sentences
    ]


@needs_default_model
def test_omitted_sentences_are_counted_and_nothing_else_changes(generator: ReportGenerator):
    without_assessing(generator, "abnormal")
    film = EXAMPLES / "chest_pa.png"
    marked = generator.generate(film, indication="cough")
    stream = generator.stream(film, indication="cough", unassessed="omit")
    assert "".join(stream).strip() == stream.report.text
    kept = [sentence.text for sentence in marked.sentences if sentence.assessed]
    assert [sentence.text for sentence in stream.report.sentences] == kept
    left = len({(s.section, s.text) for s in marked.sentences if not s.assessed})
    assert stream.report.omitted_sentences == left > 0
    assert f"Incomplete: {left} sentences were left out because this model does not assess what they say." in (
        stream.report.notes()
    )
    assert "*" not in stream.report.text
    plain = generator.generate(film, indication="cough", unassessed="plain")
    assert [s.text for s in plain.sentences] == [s.text for s in marked.sentences]
    assert [s.assessed for s in plain.sentences] == [s.assessed for s in marked.sentences]
    assert not any(note.startswith("Not assessed") for note in plain.notes())


@needs_default_model
def test_a_normal_draft_of_which_all_is_left_out_does_not_read_as_normal(generator: ReportGenerator):
    findings = generator.bundle.manifest.image_findings
    without_assessing(generator, *findings.names)
    report = generator.generate(EXAMPLES / "chest_pa.png", template=NORMAL, unassessed="omit")
    assert report.findings == report.impression == "Left out: this model does not assess it."
    assert report.sentences == () and report.omitted_sentences == 4 and report.complete
    assert "Image scores also point to: abnormal" in " ".join(report.notes())


@needs_default_model
def test_a_template_in_another_language_is_not_assessed(generator: ReportGenerator):
    report = generator.generate(
        EXAMPLES / "chest_pa.png",
        template="FINDINGS: Herz normal groß. Kein Pleuraerguss. IMPRESSION: Altersentsprechend.",
    )
    german = [sentence for sentence in report.sentences if sentence.basis == "template"]
    assert german and not any(sentence.assessed for sentence in german)
    assert all(f"{sentence.text}*" in report.text for sentence in german)
    assert all(sentence.assessed for sentence in report.sentences if sentence.basis == "image")


@needs_default_model
def test_a_structured_report_qualifies_marked_sentences_and_stays_valid(generator: ReportGenerator, tmp_path: Path):
    without_assessing(generator, "abnormal")
    film = EXAMPLES / "chest_pa.dcm"
    for how in ("mark", "omit", "plain"):
        report = generator.generate(film, indication="cough", unassessed=how)
        content = render(report, "sr", film)
        document = pydicom.dcmread(io.BytesIO(content))
        items = [
            item
            for section in document.ContentSequence
            if section.ValueType == "CONTAINER"
            for item in section.ContentSequence
        ]
        qualified = [
            (item.TextValue, child.ConceptCodeSequence[0].CodeValue)
            for item in items
            for child in item.ContentSequence
            if child.ValueType == "CODE"
        ]
        assert qualified == [(f"{s.text}*", "not-assessed") for s in report.sentences if s.marked]
        assert bool(qualified) == (how == "mark")
        assert " ".join(item.TextValue for item in items) == f"{report.findings} {report.impression}"
        path = tmp_path / f"{how}.dcm"
        path.write_bytes(content)
        if shutil.which("dciodvfy"):
            found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
            assert "Error" not in found.stderr + found.stdout
        if shutil.which("dsrdump"):
            dumped = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, timeout=60)
            assert dumped.returncode == 0
            assert dumped.stdout.count("Not assessed by the model") == len(qualified)


FILM = EXAMPLES / "chest_pa.png"
WAYS = {"mark": "*", "omit": "were left out", "plain": None}


def shows(text: str, how: str) -> bool:
    """Whether a draft of the example film shows its unassessed sentences so."""
    denial = "Heart size and mediastinal contour are within normal limits"
    return (f"{denial}.*" in text, f"{denial}.\n" in text or f"{denial}. " in text, "left out" in text) == {
        "mark": (True, False, False),
        "omit": (False, False, True),
        "plain": (False, True, False),
    }[how]


@needs_default_model
@pytest.mark.parametrize("how", WAYS)
def test_the_command_line_takes_every_way(how: str, tmp_path: Path):
    options = ("--variant", "int4", "--device", "cpu", "--unassessed", how)
    done = call_cli("cbedge.cli.main", "generate", FILM, "--indication", "cough", *options)
    assert done.returncode == 0 and shows(done.stdout, how), done.stdout + done.stderr
    out, documents = tmp_path / "drafts.jsonl", tmp_path / "documents"
    shutil.copyfile(FILM, tmp_path / "film.png")
    done = call_cli("cbedge.cli.main", "batch", tmp_path / "film.png", "-o", out, "--documents", documents, *options)
    assert done.returncode == 0, done.stderr
    line = json.loads(out.read_text())
    assert line["unassessed_shown_as"] == how
    assert (f"unassessed {how}" in line["batch_model"]) == (how != "mark")
    (document,) = documents.glob("*.txt")
    assert line["text"].replace(" IMPRESSION:", "\n\nIMPRESSION:") in document.read_text()
    other = "plain" if how == "omit" else "omit"
    again = call_cli("cbedge.cli.main", "batch", tmp_path / "film.png", "-o", out, *options[:-1], other)
    assert again.returncode != 0 and "use the same options" in again.stderr


@pytest.mark.parametrize(
    "command", [("generate", FILM), ("batch", FILM, "-o", "x.jsonl"), ("listen", "--known", "A", "--spool", "x")]
)
def test_every_command_refuses_an_unknown_way(command: tuple[object, ...], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call_cli("cbedge.cli.main", *command, "--unassessed", "hide")
    assert done.returncode != 0 and "'hide'; give mark, omit or plain" in done.stderr
    assert not list(tmp_path.iterdir())


@needs_default_model
def test_the_http_service_takes_every_way(generator: ReportGenerator):
    with TestClient(create_app(generator)) as client:
        for how in WAYS:
            data = {"indication": "cough", "format": "text", "unassessed": how}
            answer = client.post("/v1/reports", files={"image": FILM.read_bytes()}, data=data)
            assert answer.status_code == 200 and shows(answer.text, how)
            data = {"indication": "cough", "stream": "true", "unassessed": how}
            answer = client.post("/v1/reports", files={"image": FILM.read_bytes()}, data=data)
            events = re.findall(r"event: (\w+)\ndata: (.+)\n", answer.text)
            pieces = "".join(json.loads(data)["text"] for name, data in events if name == "piece")
            report = json.loads(events[-1][1])
            assert pieces.strip() == report["text"] and report["unassessed_shown_as"] == how
        answer = client.post("/v1/reports", files={"image": b"x"}, data={"unassessed": "hide"})
        assert answer.status_code == 422 and "give mark, omit or plain" in answer.json()["detail"]


@needs_default_model
@pytest.mark.parametrize("how", WAYS)
def test_the_dicom_node_writes_every_way(how: str, generator: ReportGenerator, tmp_path: Path):
    settings = ListenSettings("CBEDGE", "127.0.0.1", 11112, ("A",), None, tmp_path, unassessed=how)
    listener = Listener(generator, settings)
    listener.spool.make()
    path = listener.spool.incoming / "1.2.3.dcm"
    shutil.copyfile(EXAMPLES / "chest_pa.dcm", path)
    listener._draft(path)
    (document,) = map(pydicom.dcmread, listener.spool.outgoing.glob("*.dcm"))
    assert ("not-assessed" in document.to_json()) == (how == "mark")
    assert ("were left out because this model" in document.to_json()) == (how == "omit")


def test_the_deprecated_source_of_a_sentence_says_the_basis():
    for basis, source in (("image", "image"), ("template", "template"), ("language", "language model")):
        with pytest.warns(DeprecationWarning, match="use .basis"):
            assert Sentence("Clear.", "findings", 0.9, False, basis=basis).source == source


@needs_default_model
def test_an_abnormal_study_without_an_assessed_finding_opens_with_that(generator: ReportGenerator):
    report = generator.generate(EXAMPLES / "chest_pa.png", indication="cough")
    assert report.image_findings == (OTHER,) and "opacity" in report.unassessed_above_threshold
    first, *others = report.sentences
    assert (first.text, first.basis, first.finding) == ("Abnormal chest radiograph.", "image", "abnormal")
    assert first.assessed and report.impression == "Abnormal chest radiograph."
    texts = [sentence.text for sentence in others]
    assert not any(stated_by(text) for text in texts)  # the model's own words state no finding without a score
    assert not any("lungs are clear" in text for text in texts)  # nor deny one above its threshold


def test_with_a_users_template_the_impression_says_that_the_study_is_abnormal(generator: ReportGenerator):
    template = "FINDINGS: The trachea is midline. IMPRESSION: {}"
    kept_of = {"Normal chest.": "", "No acute disease.": "No acute disease.* ", "Abnormal chest radiograph.": ""}
    for impression, kept in kept_of.items():
        report = generator.generate(EXAMPLES / "chest_pa.png", template=template.format(impression))
        assert report.image_findings == (OTHER,)
        assert report.impression == f"{kept}Abnormal chest radiograph."
        assert report.sentences[-1].finding == "abnormal" and report.sentences[-1].assessed
