import re

import pytest
from conftest import needs_default_model

from cbedge.bundles.bundle import open_bundle
from cbedge.drafting.assertions import agrees
from cbedge.drafting.lexicon import Lexicon
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.errors import BundleError
from cbedge.findings.image_findings import OTHER, ImageFindings
from cbedge.report import DraftToken
from training.ontology import DENIALS, OPENINGS
from training.openings import with_denials


def written(text: str, denied: re.Pattern[str] | None) -> str:
    check = SentenceFilter(denied)
    words = [DraftToken(piece, 0.9, None, i) for i, piece in enumerate(re.findall(r"\s*\S+", text))]
    said = [said for word in words for said in check.add(word)] + [*check.end()]
    return "".join(word.piece for word in said)


def told(*names: str) -> re.Pattern[str] | None:
    return with_denials(ImageFindings((*DENIALS,), (0.5,) * len(DENIALS))).contradicting(names)


DRAFT = (
    " Heart size is normal. The lungs are clear. No pleural effusion or pneumothorax. Ribs intact."
    " IMPRESSION: No acute disease."
)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ((), DRAFT),
        (("cardiomegaly",), DRAFT.replace(" Heart size is normal.", "")),
        (("opacity",), " Heart size is normal. No pleural effusion or pneumothorax. Ribs intact."),
        (("effusion",), " Heart size is normal. The lungs are clear. Ribs intact."),
        (("scar", "cardiomegaly"), " No pleural effusion or pneumothorax. Ribs intact. IMPRESSION: No acute disease."),
        (("fracture",), DRAFT.replace(" Ribs intact.", "")),
    ],
)
def test_what_contradicts_a_finding_told_is_left_out(names: tuple[str, ...], kept: str):
    assert written(DRAFT, told(*names)) == kept


def test_the_same_in_other_words_and_fragments_are_left_out():
    text = " No acute osseous findings. Heart size and vascularity. No acute bony abnormality. Ribs intact."
    assert written(text, None) == " No acute osseous findings. Ribs intact."


def test_beside_an_abnormal_score_alone_the_impression_has_no_free_sentence():
    check = SentenceFilter(supported={OTHER})
    pieces = [" No", " effusion.", " IMPRESSION:", " No", " acute", " abnormality."]
    said = [said for piece in pieces for said in check.add(DraftToken(piece, 0.9, None, 1))] + [*check.end()]
    assert "".join(token.piece for token in said) == " No effusion."


def test_what_affirms_a_finding_stays():
    for name, sentence in OPENINGS.items():
        assert not told(name).search(sentence), name
    for sentence in (
        "The heart is mildly enlarged.",
        "Small left pleural effusion.",
        "Left lower lobe opacity.",
        "Right lung volumes are low.",
        "Bibasilar atelectasis.",
    ):
        pattern = told(*OPENINGS)
        assert not pattern.search(sentence), sentence


@pytest.mark.parametrize(
    ("finding", "denials", "others"),
    [
        (
            OTHER,
            [
                "Normal chest.",
                "Unremarkable examination of the chest.",
                "No abnormality.",
                "Normal.",
                "normal",
                "1. Unremarkable.",
                "Entirely normal.",
                "Chest: Normal.",
                "Normal CXR.",
                "Within normal limits.",
                "Appearances are within normal limits.",
                "Normal appearances of the chest.",
                "No abnormality detected.",
                "Chest radiograph within normal limits.",
                "NAD.",
                "Chest: WNL.",
                "Satisfactory appearances.",
                "Nothing abnormal.",
                "All questions answered; nothing abnormal.",
                '"Normal" chest.',
                "Chest = normal.",
                "neg.",
                "N.A.D.",
                "‘Normal’ chest.",
                "All clear.",
                "Nothing to report.",
            ],
            [
                "Satisfactory position of the tube.",
                "The heart is not abnormal.",
                "Heart: Normal.",
                "Bones: Unremarkable.",
                "Normal heart.",
                "No acute bony abnormality.",
                "The heart is normal in size.",
                "No acute cardiopulmonary process.",
                "The bony thorax is unremarkable.",
                "The ribs are unremarkable in appearance.",
                "Normal appearance of the heart.",
                "Trachea: no abnormality.",
            ],
        ),
        (
            "cardiomegaly",
            [
                "Heart size and pulmonary vascularity are within normal limits.",
                "Cardiac size: Normal.",
                "The heart is not enlarged.",
                "Normal cardiomediastinal silhouette.",
                "Heart size WNL.",
                "Cardiac: Normal.",
                "The cardiac outline is normal.",
                "No cardiac enlargement.",
                "Normally sized heart.",
                "The heart isn't enlarged.",
                "The heart isn’t enlarged.",
                "The heart is of usual size.",
                "CTR < 0.5.",
                "No cardiopulmonary disease.",
                "No abnormality detected.",
                "Heart N. Bones N.",
                "Heart: fine.",
                "Heart is of good size.",
                "Ht sz WNL.",
                "Heart “normal”.",
                "Is the heart enlarged? No.",
            ],
            ["CTR 0.58.", "No cardiac pacemaker.", "No acute cardiopulmonary process.", "The mediastinum is midline."],
        ),
        (
            "effusion",
            [
                "The pleural spaces are clear.",
                "No pleural fluid.",
                "Costophrenic angles are sharp.",
                "PLEURA: Unremarkable.",
                "No acute cardiopulmonary abnormality.",
                "Negative chest.",
                "There aren't any effusions.",
                "CP angles are clear.",
                "The costo-phrenic angles are sharp.",
                "No hydrothorax.",
                "Pleura: NAD.",
                "Pleura: -",
                "Pleural effusion: N.",
                "Chest clear.",
                "Clear hemithoraces.",
                "Nothing acute.",
                "No acute intrathoracic pathology.",
                "Effusion (-).",
                "Effusion = none.",
                "Is there an effusion? No.",
                "Effusion unlikely.",
                "Angles sharp.",
                "Costophrenic angles preserved.",
                "Effusion 0.",
                "Effusion -.",
            ],
            [
                "Pleural drain in good position.",
                "Effusion (+).",
                "Blunted CP angles.",
                "No acute bony abnormality.",
                "No pneumothorax.",
                "The heart is normal.",
            ],
        ),
        (
            "atelectasis",
            [
                "Lungs: Clear.",
                "Clear lungs.",
                "No atelectasis.",
                "Atelectasis: None.",
                "Atelectasis is not seen.",
                "No collapse.",
                "No volume loss.",
                "Lungs: NAD.",
                "Lungs WNL.",
                "Atelectasis: N/A.",
                "Atelectasis (−).",
                "Lungs CTA b/l.",
                "Lungs ok.",
                "Lungs: good.",
                "Healthy lungs.",
                "Both lungs are well ventilated and without focal change.",
                "Chest clear.",
            ],
            ["No vertebral collapse.", "Low lung volumes without acute disease.", "Lung volumes are normal."],
        ),
        (
            "opacity",
            [
                "The lungs are free of focal airspace disease.",
                "Negative for acute cardiopulmonary disease.",
                "No focal consolidation.",
                "The lungs are unremarkable.",
                "No air-space disease.",
                "Lungs: NAD.",
                "Lungs WNL.",
                "Chest clear.",
                "Nothing acute.",
                "No cardiopulmonary disease.",
                "Lungs are of normal volume and clear.",
                "No focal lesion in either lung.",
                "Unlikely to be pneumonia.",
                "Pneumonia is ruled out.",
                "Consolidation (-).",
                "Is there consolidation? No.",
                "Are the lungs clear? Yes.",
            ],
            ["Consolidation?", "No acute osseous findings.", "No pneumothorax.", "The lungs are well expanded."],
        ),
        (
            "low volume",
            ["Lung volumes WNL.", "Full inspiration.", "Inspiration is good.", "Lungs are adequately inflated."],
            ["Low lung volumes with disease within the right base.", "Poor inspiration."],
        ),
        ("aorta", ["Aorta WNL.", "Mediastinum: Normal."], ["No mediastinal mass.", "Unfolded aorta."]),
        (
            "congestion",
            [
                "Pulmonary vessels are normal.",
                "No pulmonary oedema.",
                "No decompensation.",
                "No edema.",
                "Lungs are clear.",
            ],
            ["No acute rib fracture."],
        ),
        (
            "fracture",
            [
                "The osseous structures are intact.",
                "Bones: Unremarkable.",
                "No acute rib fracture.",
                "Negative for acute bone abnormality.",
                "Normal chest x-ray.",
            ],
            ["No acute cardiopulmonary process.", "The lungs are clear."],
        ),
        (
            "device",
            ["No lines or tubes.", "Lines and tubes: None.", "No support apparatus."],
            ["No acute disease.", "There is no pleural line to suggest pneumothorax.", "Normal chest."],
        ),
    ],
)
def test_denials_of_a_finding_in_radiologists_words(finding: str, denials: list[str], others: list[str]):
    pattern = told(finding)
    assert pattern is not None
    assert [text for text in denials if not pattern.search(text)] == []
    assert [text for text in others if pattern.search(text)] == []


def test_a_given_sentence_that_ends_with_an_initial_is_said():
    given = ("Read by Dr. X.", "No fracture.")
    text = "FINDINGS: No mass. Read by Dr. X. No fracture. Ribs intact. IMPRESSION: Read by Dr. X."
    check = SentenceFilter(fixed=given)
    pieces = re.findall(r"\s*\S+", text)
    tokens = [DraftToken(piece, 0.9) for piece in pieces]
    said = [one.piece for token in tokens for one in check.add(token)] + [one.piece for one in check.end()]
    assert "".join(said) == text


def test_a_sentence_is_held_back_until_it_is_whole():
    check = SentenceFilter()
    words = [DraftToken(piece, 0.9, None, 1) for piece in (" No", " mass.", " Ribs")]
    assert [[*check.add(word)] for word in words] == [[], [], words[:2]]
    assert [*check.end()] == []


def test_a_sentence_without_its_end_is_left_out():
    assert written(" The heart is large. No acute", told("opacity")) == " The heart is large."
    assert written(" The lungs are clear and", told("opacity")) == ""


def test_numbered_items_whose_tokens_are_single_characters_are_sentences():
    pieces = [" IMPRESSION:", " ", "1", ".", " No mass", ".", " ", "2", ".", " Normal", "."]
    check = SentenceFilter(fixed=("1. No mass.", "2. Normal."))
    said = [one.piece for piece in pieces for one in check.add(DraftToken(piece, 0.9))] + [
        one.piece for one in check.end()
    ]
    assert "".join(said) == " IMPRESSION: 1. No mass. 2. Normal."


def test_a_section_says_nothing_twice():
    assert written(" Lungs clear. Heart normal. LUNGS CLEAR. IMPRESSION: Lungs clear.", None) == (
        " Lungs clear. Heart normal. IMPRESSION: Lungs clear."
    )
    assert written(" There is no pneumothorax. No evidence of a pneumothorax. No pneumothorax or effusion.", None) == (
        " There is no pneumothorax. No pneumothorax or effusion."
    )
    assert written(" There is a left effusion. There is a right effusion. No effusion.", None) == (
        " There is a left effusion. There is a right effusion."
    )


def test_beside_a_template_free_sentences_state_only_findings_with_a_score():
    check = SentenceFilter(fixed=("There is no effusion.",), supported={"opacity", OTHER})
    text = (
        " There is no effusion. IMPRESSION: There is a pleural effusion. Lung volumes are low. Small mass. "
        "There is pulmonary vascularity. No acute disease. Right basilar opacity. No pneumothorax. CT is recommended."
    )
    said = [one.piece for piece in re.findall(r"\s\S+", text) for one in check.add(DraftToken(piece, 0.9))]
    said += [one.piece for one in check.end()]
    assert "".join(said) == (
        " There is no effusion. IMPRESSION: Right basilar opacity. No pneumothorax. CT is recommended."
    )


def test_a_word_that_nobody_knows_takes_its_sentence_away_but_not_a_given_one():
    lexicon = Lexicon.compile([" Lungs are clear. Heart normal."] * 10)
    check = SentenceFilter(None, lexicon, fixed=("Herz normal.",))
    words = [DraftToken(piece, 0.9) for piece in re.findall(r"\s*\S+", " Lungs clear. Bapprastra clear. Herz normal.")]
    said = [said.piece for word in words for said in check.add(word)] + [said.piece for said in check.end()]
    assert "".join(said) == " Lungs clear. Herz normal." and check.has_unknown_word


def test_a_denial_that_is_no_regular_expression_or_without_its_finding_is_refused():
    with pytest.raises(BundleError, match="not a regular expression"):
        ImageFindings(("abnormal",), (0.5,), (), (("(",),)).contradicting(["abnormal"]).search("The lungs are clear.")
    with pytest.raises(ValueError, match="1 findings with 2 denials"):
        ImageFindings(("abnormal",), (0.5,), (), ((), ()))


@needs_default_model
def test_the_embedded_models_denials_are_those_of_the_ontology():
    findings = open_bundle().manifest.image_findings
    assert findings is not None and findings.denials == tuple(DENIALS.get(name, ()) for name in findings.names)


@pytest.mark.parametrize(
    ("sentence", "present", "agreeing"),
    [
        ("Small pleural effusion.", ["effusion"], True),
        ("No effusion.", ["effusion"], False),
        ("No pneumothorax.", ["effusion"], True),
        ("No pneumothorax.", [OTHER], False),
        ("Follow-up in 6 weeks is advised.", ["opacity"], True),
        ("Clinical correlation is recommended.", [OTHER], True),
        ("No follow-up is needed.", ["opacity"], False),
        ("(a) Normal (b) Follow-up.", ["opacity"], False),
        ("Unlikely to be pneumonia.", ["opacity"], False),
        ("As above.", ["opacity"], False),
        ("Splendid.", ["opacity"], False),
    ],
)
def test_a_sentence_of_an_impression_is_understood_to_agree_or_not(sentence: str, present: list[str], agreeing: bool):
    assert agrees(sentence, present) == agreeing


@pytest.mark.parametrize(
    ("finding", "denials", "others"),
    [
        (
            "nodule",
            ["No nodules or masses.", "The lungs are clear.", "No suspicious pulmonary nodule is seen."],
            ["There is a nodule in the right upper lobe.", "No pleural effusion.", "No acute bony lesion."],
        ),
        ("calcification", ["No calcified granulomas."], ["Calcified granuloma in the right lung.", "No pneumothorax."]),
        (
            "spine",
            ["The spine is normal.", "No degenerative changes.", "Osseous structures are unremarkable."],
            ["No acute bony abnormality.", "Degenerative changes of the spine.", "No rib fractures."],
        ),
        ("hernia", ["No hiatal hernia.", "Hernia: none."], ["There is a hiatal hernia.", "Heart size is normal."]),
        (
            "pneumothorax",
            ["No pleural effusion or pneumothorax.", "Pneumothorax: no.", "The pleural spaces are clear."],
            ["There is a small left pneumothorax.", "The lungs are clear.", "No rib fracture."],
        ),
        (
            "consolidation",
            ["No focal consolidation.", "No focal airspace disease.", "The lungs are clear."],
            ["Consolidation in the left lower lobe.", "No pneumothorax."],
        ),
        (
            "edema",
            ["No evidence of pulmonary oedema.", "Pulmonary vasculature is within normal limits."],
            ["Mild interstitial edema.", "Heart size is normal."],
        ),
        (
            "pleural thickening",
            ["No pleural thickening.", "The pleura is unremarkable.", "No pleural abnormality."],
            ["There is apical pleural thickening.", "No pleural effusion."],
        ),
    ],
)
def test_what_denies_a_finding_without_an_opening_is_known(finding: str, denials: list[str], others: list[str]):
    pattern = told(finding)
    for sentence in denials:
        assert pattern.search(sentence), sentence
        assert pattern.search("Normal chest.")
    for sentence in others:
        assert not pattern.search(sentence), sentence
