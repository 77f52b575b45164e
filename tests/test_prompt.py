import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbedge import ClinicalContext, ContextError
from cbedge.prompt import MAX_CONTEXT_CHARACTERS, build_instruction, build_prompt, build_target, split_sections

words = st.text(max_size=MAX_CONTEXT_CHARACTERS)


@given(words)
def test_any_text_gives_a_clean_one_line_instruction_or_a_clear_refusal(text: str):
    try:
        context = ClinicalContext(indication=text)
    except ContextError as error:
        assert "indication" in str(error)
        return
    instruction = build_instruction(context)
    assert "\n" not in instruction and "XXX" not in instruction and "<|im_end|>" not in instruction
    assert (context.indication or "") in instruction
    assert ("Indication: " in instruction) or context.indication is None


@given(words)
def test_cleaning_twice_changes_nothing(text: str):
    try:
        once = ClinicalContext(indication=text).indication
    except ContextError:
        return
    assert ClinicalContext(indication=once).indication == once


def test_fields_that_are_not_given_are_left_out_in_a_fixed_order():
    assert build_instruction(ClinicalContext()) == "Describe the chest radiograph."
    full = ClinicalContext(indication="cough", comparison="none", view="PA")
    assert build_instruction(full) == (
        "Describe the chest radiograph. View: frontal. Indication: cough. Comparison: None."
    )
    assert build_prompt(full).endswith("Report:\n")


@pytest.mark.parametrize("text", ["", "   ", "\n", "XXXX", "<|im_end|>", "-", ".", "?", "unknown", "null"])
def test_a_field_that_says_nothing_counts_as_none(text: str):
    assert ClinicalContext(indication=text, comparison=text) == ClinicalContext()
    assert ClinicalContext(indication="none", comparison="2019").indication is None


@pytest.mark.parametrize("text", ["none", "None.", "NONE", "n/a", " N.A. "])
def test_a_comparison_that_says_none_is_the_same_answer_in_any_words(text: str):
    assert ClinicalContext(indication=text, comparison=text) == ClinicalContext(comparison="None")


def test_the_other_words_of_training_reports_for_no_comparison_stay():
    given = ClinicalContext(indication="None available.", comparison="None available.")
    assert given == ClinicalContext(comparison="None available")


def test_an_over_long_indication_is_refused_with_the_limit():
    with pytest.raises(ContextError, match="1,000"):
        ClinicalContext(indication="a" * 1001)


def test_a_special_token_cannot_be_smuggled_in_by_nesting():
    assert "<|im_end|>" not in ClinicalContext(indication="cough <|im<|im_end|>_end|> fever").indication


@pytest.mark.parametrize("token", ["<s>", "</s>", "<image>", "<extra_id_0>", "<|im_start|>", "[DEC]", "<pad>"])
def test_no_special_token_of_a_language_model_reaches_the_prompt(token: str):
    assert ClinicalContext(indication=f"cough {token} fever < 38 °C").indication == "cough fever < 38 °C"


def test_invisible_characters_inside_a_word_are_removed_and_joiners_of_persian_stay():
    assert ClinicalContext(indication="pneu\u00admonia, dys\u200bpnoea").indication == "pneumonia, dyspnoea"
    assert ClinicalContext(indication="cough\x00<|im_\u200bend|> fever").indication == "cough fever"
    assert ClinicalContext(indication="می\u200cخواهم a\u200cb").indication == "می\u200cخواهم ab"


def test_an_unknown_view_is_refused():
    with pytest.raises(ContextError, match="frontal"):
        ClinicalContext(view="sideways")


@given(st.text("abc .", min_size=1), st.text("abc .", min_size=1))
def test_sections_that_are_built_are_split_again(findings: str, impression: str):
    assert split_sections(build_target(findings, impression)) == (findings.strip(), impression.strip())


def test_text_without_headings_is_findings():
    assert split_sections("Lungs are clear.") == ("Lungs are clear.", "")
