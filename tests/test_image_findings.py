import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from cbedge import ReportGenerator
from cbedge.decoding import Decoding
from cbedge.errors import OptionError
from cbedge.findings.image_findings import OTHER, ImageFindings, Measured, Standing, scores_of
from cbedge.prompt import ClinicalContext, build_opening, build_prompt, build_query_instruction
from training.findings import positive_findings
from training.ontology import OPENINGS, TAG_FINDINGS

FINDINGS = ImageFindings(("abnormal", "effusion", "opacity"), (0.5, 0.3, 0.4))


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ((0.4, 0.9, 0.9), ()),
        ((0.5, 0.9, 0.4), ("effusion", "opacity")),
        ((0.9, 0.1, 0.5), ("opacity",)),
        ((0.9, 0.1, 0.1), (OTHER,)),
    ],
)
def test_the_gate_comes_first_and_thresholds_decide_behind_it(scores: tuple[float, ...], told: tuple[str, ...]):
    assert FINDINGS.read(scores) == told


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ((0.9, 0.5, 0.9), ("low volume",)),
        ((0.9, 0.8, 0.7), ("hyperinflation",)),
        ((0.9, 0.5, 0.5), ("hyperinflation",)),
        ((0.9, 0.1, 0.1), (OTHER,)),
    ],
)
def test_lungs_are_not_both_too_large_and_too_small(scores: tuple[float, ...], told: tuple[str, ...]):
    findings = ImageFindings(("abnormal", "hyperinflation", "low volume"), (0.5, 0.3, 0.6))
    assert findings.read(scores) == told


def test_names_without_thresholds_are_refused():
    with pytest.raises(ValueError, match="2 findings with 1 thresholds"):
        ImageFindings(("abnormal", "effusion"), (0.5,))


def test_told_findings_open_the_draft_in_order_with_the_sentence_that_they_have():
    findings = ImageFindings(
        *zip(
            ("abnormal", 0.5, ""),
            ("effusion", 0.3, "An effusion."),
            ("device", 0.4, ""),
            ("scar", 0.4, "Scarring."),
            strict=True,
        )
    )
    assert findings.open(("scar", "device", "effusion")) == {"effusion": "An effusion.", "scar": "Scarring."}
    assert findings.open(()) == findings.open((OTHER,)) == FINDINGS.open(("effusion",)) == {}
    assert build_opening(["A.", "B."]) == ["FINDINGS: A.", " B."]
    with pytest.raises(ValueError, match="2 findings with 1 openings"):
        ImageFindings(("abnormal", "effusion"), (0.5, 0.5), ("x",))


def test_each_finding_weighs_the_lateral_view_its_own_way():
    frontal, lateral = np.array([1.0, 2.0, 4.0]), np.array([3.0, 0.0, 0.0])
    assert FINDINGS.join(frontal, lateral).tolist() == [2, 1, 2]
    weighed = replace(FINDINGS, lateral_shares=(0.5, 0.25, 0.0))
    assert weighed.join(frontal, lateral).tolist() == [2, 1.5, 4]
    with pytest.raises(ValueError, match="3 findings with 1 shares"):
        replace(FINDINGS, lateral_shares=(0.5,))
    with pytest.raises(ValueError, match="give 0 to 1"):
        replace(FINDINGS, lateral_shares=(0.5, 2.0, 0.0))


def test_scores_stay_between_0_and_1_for_any_logit():
    scores = scores_of(np.array([-1e9, 0.0, 1e9], np.float32))
    assert scores[1] == 0.5 and 0 <= scores[0] < scores[2] <= 1


def test_the_prompt_tells_what_is_seen_and_the_qformer_never_reads_the_indication():
    context = ClinicalContext(indication="cough", view="frontal")
    assert "Seen: effusion, opacity.\nReport:" in build_prompt(context, ("effusion", "opacity"))
    assert "Seen: none.\n" in build_prompt(context, ())
    assert "Seen" not in build_prompt(context)
    assert "cough" not in build_query_instruction(context) and "frontal" in build_query_instruction(context)


def test_a_report_says_what_the_model_saw(tiny_bundle: Path, chest_png: Path):
    report = ReportGenerator.from_pretrained(tiny_bundle, device="cpu").generate(chest_png, max_new_tokens=4)
    assert list(report.finding_scores) == ["abnormal", "cardiomegaly", "effusion", "opacity"]
    assert all(0 <= score <= 1 for score in report.finding_scores.values())
    told = json.loads(report.to_json())
    assert told["image_findings"] == list(report.image_findings)


def test_a_draft_begins_with_what_was_seen_whatever_writes_the_rest(tiny_bundle: Path, chest_png: Path):
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    told = ImageFindings(
        ("abnormal", "cardiomegaly", "effusion", "opacity"),
        (0.0, 0.0, 1.0, 0.0),
        ("", "The heart is enlarged.", "An effusion.", "There is opacity."),
    )
    object.__setattr__(generator.bundle.manifest, "image_findings", told)
    start = "FINDINGS: The heart is enlarged. There is opacity."
    for settings in (Decoding(), Decoding(beams=2), Decoding(temperature=1.0)):
        stream = generator.stream(chest_png, max_new_tokens=90, decoding=settings)
        assert "".join(stream).strip() == stream.report.text and stream.report.text.startswith(start)
        heart, opacity = stream.report.sentences[:2]
        assert (heart.finding, opacity.finding) == ("cardiomegaly", "opacity")
        assert heart.confidence == pytest.approx(stream.report.finding_scores["cardiomegaly"])
        assert 0 < stream.report.opening_tokens <= stream.report.new_tokens <= 90
    short = generator.generate(chest_png, max_new_tokens=3)  # not a whole sentence
    assert short.new_tokens == 0 and short.text == "" and not short.complete


def test_the_sentences_that_come_with_the_package_name_their_finding_and_no_other():
    sentences = list(OPENINGS.values())
    for name, found in zip(OPENINGS, positive_findings(sentences), strict=True):
        assert found and found <= set(TAG_FINDINGS[name]), name


def test_what_the_model_saw_does_not_hang_on_the_indication(tiny_bundle: Path, chest_png: Path):
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    one, other = (generator.generate(chest_png, indication=i, max_new_tokens=2) for i in ("cough", "heart failure"))
    assert one.finding_scores == other.finding_scores


def test_a_finding_is_assessed_where_its_lower_bound_holds():
    good, poor = Measured(0.85, 0.78, 0.91, 300, 30), Measured(0.74, 0.66, 0.81, 300, 30)
    assert [Standing(*pair).is_assessed(familiar=True) for pair in ((good, good), (good, poor), (poor, good))] == [
        True,
        False,
        True,
    ]
    assert Standing(good).is_assessed(familiar=True) and not Standing(good).is_assessed(familiar=False)
    assert not Standing(poor).is_assessed(familiar=True) and not Standing().is_assessed(familiar=True)


def test_standings_and_operating_points_survive_a_manifest():
    measured = Measured(0.85, 0.78, 0.91, 300, 30)
    findings = replace(
        FINDINGS,
        standings=(Standing(measured, measured), Standing(measured), Standing()),
        operating_points={"sensitive": (0.2, 0.1, 0.1)},
    )
    again = ImageFindings.from_json(json.loads(json.dumps(asdict(findings))))
    assert again == findings
    assert (again.unassessed(familiar=True), again.unassessed(familiar=False)) == (
        ("opacity",),
        ("effusion", "opacity"),
    )
    assert again.at("sensitive").thresholds == (0.2, 0.1, 0.1)
    with pytest.raises(OptionError, match="unknown operating point 'keen'; known: sensitive"):
        again.at("keen")
    assert FINDINGS.unassessed() == ()  # nothing was measured of an older bundle
