import pytest
from conftest import needs_default_model

from benchmarks.templates import read_styles
from cbedge.bundles.bundle import TEMPLATES, open_bundle
from cbedge.drafting.assertions import is_fragment, may_concern, stated_by
from cbedge.drafting.language import are_english
from cbedge.drafting.plan import _foreign, _sections
from cbedge.drafting.template_parser import parse_template
from cbedge.drafting.templates import Template, Templates
from cbedge.findings.image_findings import OTHER
from cbedge.sentences import split_text


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
        ("Lung volumes are low.", ["low volume"]),
        ("Low lung volumes.", ["low volume"]),
        ("The heart is not big.", []),
        ("Small e\ufb00usion.", ["effusion"]),
        ("\uff30\uff4e\uff45\uff55\uff4d\uff4f\uff4e\uff49\uff41.", ["opacity"]),
    ],
)
def test_what_a_sentence_states(sentence: str, names: list[str]):
    assert stated_by(sentence) == names


@needs_default_model
def test_no_sentence_of_a_normal_template_states_an_abnormality():
    bundle = open_bundle()
    parsed = [parse_template(text) for text in Templates.load(bundle.folder / TEMPLATES).texts]
    parsed += [parse_template(style.text) for style in read_styles()]
    whole = [(*one.findings, *one.impression) for one in parsed]
    sentences = {text for texts in whole if all(are_english(texts)) for text in texts}
    assert sentences and [text for text in sentences if stated_by(text)] == []


@needs_default_model
def test_an_abnormality_that_no_score_points_to_is_warned_of():
    manifest = open_bundle().manifest
    template = parse_template("Heart normal. There is a large effusion. No fracture.\nIMPRESSION: Effusion.")
    kept, warnings = _sections(template, _foreign(template), False, (), (), manifest)
    assert kept == template
    assert [warning.split(":")[0] for warning in warnings] == [
        f"The template's sentence {text!r} states effusion, which the image scores do not point to"
        for text in ("There is a large effusion.", "Effusion.")
    ]
    assert _sections(template, _foreign(template), False, (), ("effusion",), manifest)[1] == []


DENIED = {
    "opacity": "The lungs are free from opacities. Both lungs are free. No signs of infection. Airspaces normal. "
    "No alveolar process. No GGO. Lung fields are clean. Infection is not seen. Homogeneous lung transparency. "
    "Both lungs are well aerated. Nothing focal. No patchy shadows seen. No in\ufb01ltrate.",
    "cardiomegaly": "Cardiothoracic ratio is 46%. CTR 48%. C/T ratio normal. Cardiovascular: Normal. Heart is small. "
    "The cardiopericardial silhouette is normal. Cardiovascular silhouette is within normal limits.",
    "effusion": "No haemothorax. Both costophrenic angles are well defined. No blunting. No e\ufb00usion.",
    "atelectasis": "Well aerated lungs. Lungs are well expanded. No plate-like densities.",
    "hyperinflation": "No air trapping. The diaphragms are not flattened. Normal inspiration. No COPD.",
    "low volume": "Lung volumes preserved. Well inflated lungs.",
    "aorta": "Great vessels normal. Aortic arch: no tortuosity. No tortuosity. No aneurysm.",
    "scar": "No ILD. No sequelae. No apical thickening.",
    "device": "Support apparatus: None. No sternal wires. No PICC. No CVC. No surgical clips. No lines.",
    "congestion": "No CHF. No cephalization. No Kerley lines. No upper lobe diversion. No fluid overload. No stasis.",
    "fracture": "MSK: normal. No acute traumatic abnormality. No traumatic lesion.",
    OTHER: "Clear chest. Normal heart and lungs. All normal. No pathological findings. No disease. Nil of note. "
    "No problem found. Normal two-view chest. Splendidly normal.",
}
KEPT = {
    "opacity": "The heart is not enlarged. No pneumothorax. Trachea midline, no deviation. The ribs are intact. "
    "Apices are clear. No free air below the diaphragm. The film was read at 10.30. Right basilar opacity.",
    "cardiomegaly": "The lungs are clear. No acute cardiopulmonary process. No cardiac pacemaker. CTR is increased.",
    "effusion": "No acute bony abnormality. Heart size is normal. Large effusion without pneumothorax.",
    "device": "Normal chest. No acute disease. Pleural drain in good position. The tube voltage was 125 kV, no. 7.",
    "fracture": "The lungs are clear. No acute cardiopulmonary process. Spine is straight.",
    OTHER: "Normal heart. No acute disease. Lungs clear. No effusion.",
}


@needs_default_model
@pytest.mark.parametrize("finding", DENIED)
def test_beside_a_finding_a_sentence_stays_only_if_it_is_about_something_else(finding: str):
    manifest = open_bundle().manifest
    denied, kept = split_text(DENIED[finding]), split_text(KEPT.get(finding, "There is no foetal comparison film."))
    template = Template((*denied, *kept), (*denied,))
    drafted, warnings = _sections(template, _foreign(template), False, (), (finding,), manifest)
    assert drafted.findings == tuple(kept) and drafted.impression == ()
    assert [f"The template's sentence {text!r} was left out because " for text in (*denied, *denied)] == [
        warning[: warning.index("because ") + 8] for warning in warnings if "left out" in warning
    ]


@needs_default_model
def test_sentences_in_another_language_are_told_as_unchecked_with_and_without_findings():
    manifest = open_bundle().manifest
    mixed = parse_template(
        "Heart normal. Kein Pleuraerguss. Pas d'épanchement.\nIMPRESSION: Normal heart. Normalbefund."
    )
    told = (
        "The template's sentences 'Kein Pleuraerguss.', \"Pas d'épanchement.\"{} are not in English and could not be "
    )
    drafted, warnings = _sections(mixed, _foreign(mixed), False, (), (), manifest)
    assert (drafted.findings, drafted.impression) == (mixed.findings, mixed.impression)
    told_all = told.format(", 'Normalbefund.'")
    assert warnings == [f"{told_all}checked against the image scores. Check each sentence."]
    drafted, warnings = _sections(mixed, _foreign(mixed), False, (), ("effusion",), manifest)
    assert (drafted.findings, drafted.impression) == (mixed.findings, ("Normal heart.",))
    assert warnings == [
        "The template's sentence 'Normalbefund.' was left out because the image scores point to effusion and it is not "
        "in English, so it cannot be checked.",
        f"{told.format('')}checked against the image scores, which point to effusion. Check each sentence.",
    ]
    german = parse_template("Herz normal. Kein Erguss.")
    (warning,) = _sections(german, _foreign(german), False, (), (), manifest)[1]
    assert warning == (
        "The template's sentences are not in English and could not be checked against the image scores. "
        "Check each sentence."
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "Normal PA and lateral views.",
        "Unremarkable frontal projection.",
        "No effusion, otherwise normal.",
        "No pulmonary edema; all else is normal.",
        "The remainder of the mediastinum and everything else is normal.",
        "Everything seen is as it should be.",
        "No effusion or air leak.",
        "No effusion or coin shadow.",
        "No congestion or pneumonitis.",
        "No effusion, zones clear.",
        "No effusion or bullae.",
        "Aorta normal without plaque.",
        "No effusion or cortical break.",
        "No effusion, GE junction normal.",
    ],
)
def test_a_denial_with_a_word_that_is_not_known_may_deny_anything(sentence: str):
    assert all(may_concern(sentence, name) for name in ("pneumothorax", "nodule", "fracture", "hernia", "whatnot"))


@pytest.mark.parametrize(
    "sentence",
    [
        "The mediastinum is unremarkable.",
        "There is no large pleural effusion.",
        "The aorta is normal in caliber.",
        "Pulmonary vascularity is within normal limits.",
        "The hilar contours are normal.",
        "Soft tissues are normal.",
    ],
)
def test_a_denial_of_what_is_known_denies_nothing_else(sentence: str):
    assert not any(may_concern(sentence, name) for name in ("nodule", "fracture", "device"))


@pytest.mark.parametrize(
    ("sentence", "fragment"),
    [
        ("Heart size and pulmonary vascularity.", True),
        ("Lungs and pleura.", True),
        ("Heart size normal.", False),
        ("Stable cardiomediastinal silhouette.", False),
        ("Cardiomegaly.", False),
        ("No effusion.", False),
        ("Degenerative changes of the spine.", False),
    ],
)
def test_a_sentence_that_names_things_and_says_nothing_is_a_fragment(sentence: str, fragment: bool):
    assert is_fragment(sentence) is fragment
