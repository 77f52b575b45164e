import pytest
from conftest import needs_default_model

from benchmarks.templates import read_styles
from cbedge.bundles.bundle import TEMPLATES, open_bundle
from cbedge.drafting.assertions import stated_by
from cbedge.drafting.plan import _sections
from cbedge.drafting.template_parser import parse_template
from cbedge.drafting.templates import Templates
from cbedge.findings.image_findings import OTHER


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("There is a large right pleural effusion.", ["effusion"]),
        ("The heart is enlarged.", ["cardiomegaly"]),
        ("There is a mass in the left upper lobe.", [OTHER]),
        ("Pneumonia.", ["opacity"]),
        ("Large effusion without pneumothorax.", ["effusion"]),
        ("Atelectasis with no collapse.", ["atelectasis"]),
        ("No effusion, pneumothorax or fracture.", []),
        ("The heart isn’t enlarged.", []),
        ("Effusion: none.", []),
        ("Pleural effusion: 0.", []),
        ("Lungs without effusion.", []),
    ],
)
def test_what_a_sentence_states(sentence: str, names: list[str]):
    assert stated_by(sentence) == names


@needs_default_model
def test_no_sentence_of_a_normal_template_states_an_abnormality():
    bundle = open_bundle()
    parsed = [parse_template(text) for text in Templates.load(bundle.folder / TEMPLATES).texts]
    parsed += [parse_template(style.text) for style in read_styles()]
    sentences = {text for one in parsed if one.english for text in (*one.findings, *one.impression)}
    assert [text for text in sentences if stated_by(text)] == []


@needs_default_model
def test_an_abnormality_that_no_score_points_to_is_warned_of():
    manifest = open_bundle().manifest
    template = parse_template("Heart normal. There is a large effusion. No fracture.\nIMPRESSION: Effusion.")
    kept, warnings = _sections(template, False, (), (), manifest)
    assert kept == template
    assert [warning.split(":")[0] for warning in warnings] == [
        f"The template's sentence {text!r} states effusion, which the image scores do not point to"
        for text in ("There is a large effusion.", "Effusion.")
    ]
    assert _sections(template, False, (), ("effusion",), manifest)[1] == []
