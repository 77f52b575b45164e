from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbedge import BundleError, ClinicalContext, ContextError
from cbedge.drafting.templates import Templates, context_features, parse_template, read_template

TEXTS = ("FINDINGS: Lungs are clear. IMPRESSION: Normal chest.", "FINDINGS: No effusion. IMPRESSION: No acute disease.")


def templates() -> Templates:
    """The second one is usual where somebody coughs, the first everywhere else."""
    weights = np.zeros((512, 2), np.float32)
    (cough, _), (always, _) = (context_features(c, 512) for c in (ClinicalContext("cough"), ClinicalContext()))
    weights[np.setdiff1d(cough, always), 1] = 1.0
    return Templates(TEXTS, weights, np.array([0.5, 0.0], np.float32))


def test_the_template_is_chosen_by_indication(tmp_path: Path):
    templates().save(tmp_path / "templates.npz")
    for known in (templates(), Templates.load(tmp_path / "templates.npz")):
        assert known.texts == TEXTS
        assert known.choose(ClinicalContext()) == known.choose(ClinicalContext(view="frontal")) == TEXTS[0]
        assert known.choose(ClinicalContext("cough")) == TEXTS[1]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_file_that_holds_no_templates_is_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "templates.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"templates\.npz"):
        Templates.load(path)
    np.savez(path, texts=np.array(TEXTS), weights=np.zeros((4, 3), np.int8), scale=np.ones(3), bias=np.zeros(3))
    with pytest.raises(BundleError, match=r"templates\.npz"):
        Templates.load(path)


@pytest.mark.parametrize("text", ["", " .", "IMPRESSION: Normal.", "FINDINGS:", "x" * 4001, None])
def test_what_is_no_normal_report_is_refused(text: str):
    with pytest.raises(ContextError, match="template"):
        read_template(text)


def test_a_template_is_cleaned_and_headed():
    assert read_template("Lungs\nare  clear. <|im_end|> IMPRESSION: Normal chest") == TEXTS[0]
    assert read_template("The chest is normal") == "FINDINGS: The chest is normal."
    assert read_template(read_template(TEXTS[1])) == TEXTS[1]


PROSE = "The lungs are clear. No pleural effusion, approx. 1.5 cm e.g. at the apex. Seen by Dr. Hall. Heart normal."
FORM = """TECHNIQUE: PA and lateral views
Lungs: Clear
- HEART: normal in size, 12.5 cm.
• The ribs, the spine and the soft tissues that this film shows are without
  acute abnormality
Opinion:
1. No acute disease
2. Normal film.
"""


def test_prose_is_read_in_sentences_that_know_abbreviations_and_decimals():
    assert parse_template(PROSE).findings == (
        "The lungs are clear.",
        "No pleural effusion, approx. 1.5 cm e.g. at the apex.",
        "Seen by Dr. Hall.",
        "Heart normal.",
    )


def test_a_form_keeps_its_labels_and_numbers_and_its_own_headings_are_mapped():
    template = parse_template(FORM)
    assert template.findings == (
        "TECHNIQUE: PA and lateral views.",
        "Lungs: Clear.",
        "HEART: normal in size, 12.5 cm.",
        "The ribs, the spine and the soft tissues that this film shows are without acute abnormality.",
    )
    assert template.impression == ("1. No acute disease.", "2. Normal film.")
    assert template.english


@pytest.mark.parametrize(
    ("heading", "impression"),
    [
        ("CONCLUSION", True),
        ("Comment", True),
        ("Beurteilung", True),
        ("IMPRESSION", True),
        ("Result", True),
        ("印象", True),
        ("Lungs", False),
        ("TECHNIQUE", False),
    ],
)
def test_headings_that_stand_for_impression_are_known(heading: str, impression: bool):
    for text in (f"Heart normal.\n{heading}: All well.", f"Heart normal. {heading}: All well."):
        template = parse_template(text)
        assert template.impression == (("All well.",) if impression else ())
        assert impression or template.findings[-1] == f"{heading}: All well."


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("Das Herz ist normal groß. Kein Pleuraerguss.", False),
        ("Le cœur est de taille normale. Pas d'épanchement pleural.", False),
        ("Лёгкие чистые.", False),
        ("THE HEART IS NORMAL. LUNGS CLEAR.", True),
        ("No haemothorax. The oesophagus is not dilated.", True),
    ],
)
def test_the_language_of_a_template_is_told_by_its_words(text: str, english: bool):
    assert parse_template(text).english == english


def test_marks_of_markdown_are_dropped_and_its_headings_known():
    template = parse_template("## Findings\n**Lungs:** clear.\n- Heart normal.\n\n# **Impression**\nNo acute disease.")
    assert template.findings == ("Lungs: clear.", "Heart normal.")
    assert template.impression == ("No acute disease.",)


@pytest.mark.parametrize(
    "text",
    ["FINDINGS: The lungs are clear IMPRESSION: Normal.", r"{\rtf1 FINDINGS: Lungs are clear.\par IMPRESSION: None.}"],
)
def test_a_heading_inside_a_sentence_is_refused(text: str):
    with pytest.raises(ContextError, match="inside a sentence: put the heading on its own line"):
        parse_template(text)


def test_a_sentence_that_a_section_says_twice_is_taken_once():
    assert parse_template("Lungs clear. Heart normal. LUNGS CLEAR! ").findings == ("Lungs clear.", "Heart normal.")


@pytest.mark.parametrize("blank", ["___", "XXXX", "[ ]", "<side>"])
def test_a_template_with_blanks_is_refused(blank: str):
    with pytest.raises(ContextError, match="blank"):
        parse_template(f"The lungs are clear. The effusion measures {blank} cm.")


@given(st.lists(st.sampled_from([*PROSE.split(". "), *FORM.splitlines()]), min_size=1, max_size=12))
def test_a_template_that_was_read_reads_the_same_again(lines: list[str]):
    try:
        template = parse_template("\n".join(lines))
    except ContextError:
        return
    assert parse_template(template.text).text == template.text
