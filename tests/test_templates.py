from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import CONTROLS, STOP, WORDS, RandomModel, ids

from cbedge import BundleError, ClinicalContext, ContextError
from cbedge.decoding import Decoding, Drafting, GuessLength, sample, speculate
from cbedge.templates import Keeping, Templates, context_features, read_template

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


@pytest.mark.parametrize("text", ["", " .", "IMPRESSION: Normal.", "FINDINGS:", "x" * 1001, None])
def test_what_is_no_normal_report_is_refused(text: str):
    with pytest.raises(ContextError, match="template"):
        read_template(text)


def test_a_template_is_cleaned_and_headed():
    assert read_template("Lungs\nare  clear. <|im_end|> IMPRESSION: Normal chest") == TEXTS[0]
    assert read_template("The chest is normal") == "FINDINGS: The chest is normal."
    assert read_template(read_template(TEXTS[1])) == TEXTS[1]


# Tokens of a small language: 1 ends a sentence, 2 and 3 are the headings, 0 ends the report.
FINDINGS, IMPRESSION, HEADINGS = [4, 5, 1, 4, 6, 1, 7, 1], [8, 1], ([2, 1], [3, 1])
WHOLE = [2, 1, *FINDINGS, 3, 1, *IMPRESSION, 0]


def keeping(**options) -> Keeping:
    return Keeping(FINDINGS, IMPRESSION, HEADINGS, STOP, {1}, **options)


def unsure(seed: int) -> RandomModel:
    """A language model to which no token is much likelier than another."""
    model = RandomModel(seed)
    model.table /= 4
    return model


def write(model: RandomModel, keep: Keeping, begun: Sequence[int] = ()) -> list[int]:
    return [*begun, *ids(sample(model, model.prefill(), STOP, 40, Decoding(favour=keep), begun=begun))]


def test_a_draft_keeps_to_its_template_to_the_last_token():
    for seed in range(20):
        assert write(unsure(seed), keeping()) == WHOLE
        assert write(unsure(seed), keeping(), [2, 1, 9, 9, 1])[5:] == WHOLE[2:], "behind what opened it"


def test_the_language_model_may_leave_the_template_and_comes_back_to_what_is_left():
    model = unsure(0)
    model.table[2, 1, 9], model.table[:, 9, 1], model.table[4, 6] = 30.0, 20.0, model.table[4, 5]
    assert write(model, keeping()) == [2, 1, 9, 1, *WHOLE[2:]]
    skipping = unsure(0)
    skipping.table[:, 4, 5] = -30.0  # never the first sentence
    assert write(skipping, keeping()) == [2, 1, 4, 6, 1, 7, 1, 3, 1, 8, 1, 0]


def test_findings_that_do_not_yet_say_what_was_seen_need_not_end():
    assert keeping(open_end=True).favoured([2, 1, *FINDINGS]) == {}
    assert keeping(open_end=True).favoured([2, 1, *FINDINGS, 9, 1])[3] > 0
    assert keeping().favoured([2, 1, *FINDINGS])[3] > 0


def test_an_impression_that_is_not_the_templates_is_left_alone():
    keep = Keeping(FINDINGS, [], HEADINGS, STOP, {1})
    assert keep.favoured([2, 1, *FINDINGS])[3] > 0
    assert keep.favoured([2, 1, *FINDINGS, 3, 1]) == keep.favoured([2, 1, *FINDINGS, 3, 1, 8]) == {}


tokens = st.lists(st.integers(1, WORDS - 1), max_size=20)


@settings(max_examples=300, deadline=None)
@given(findings=tokens, impression=tokens, seed=st.integers(0, 1000), open_end=st.booleans(), begun=tokens,
       controls=st.sampled_from(CONTROLS))  # fmt: skip
def test_guesses_from_a_template_change_no_token(findings, impression, seed, open_end, begun, controls):
    keep = Keeping(findings, impression, HEADINGS, STOP, {1}, open_end)
    controls = replace(controls, favour=keep)
    model, fresh = RandomModel(seed), RandomModel(seed)
    wanted = ids(sample(model, model.prefill(), STOP, 40, controls, begun=begun))
    drafting = Drafting()
    written = ids(speculate(fresh, fresh.prefill(), STOP, 40, keep, GuessLength(), drafting, controls, begun))
    assert written == wanted
    assert drafting.accepted <= drafting.guessed


def test_drafts_that_keep_to_their_template_take_fewer_passes():
    tokens, passes = 0, 0
    for seed in range(100):
        fresh, drafting = unsure(seed), Drafting()
        chosen = Decoding(favour=keeping())
        written = ids(speculate(fresh, fresh.prefill(), STOP, 40, keeping(), GuessLength(), drafting, chosen))
        tokens, passes = tokens + len(written), passes + fresh.passes
        assert drafting.accepted >= drafting.guessed - 1  # the stop token is the last one in any case
    assert passes < 0.5 * tokens
