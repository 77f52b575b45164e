from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, draw_chest, draw_lateral, needs_default_model

from cbedge import ContextError, Report, ReportGenerator, load_radiograph
from cbedge.decoding import Decoding
from cbedge.drafting.recent import Recent


def said(report: Report) -> tuple:
    """What of a draft must be the same, however it was come by; confidence to the digits that are shown."""
    sentences = [(s.text, s.section, s.finding, round(s.confidence, 3)) for s in report.sentences]
    scores = {name: round(score, 3) for name, score in report.finding_scores.items()}
    return report.text, sentences, scores, report.prompt_tokens, report.new_tokens


@pytest.fixture(scope="module")
def forgetful(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, "fp32", device="cpu", recent_studies=0)


@pytest.fixture
def generator(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, "fp32", device="cpu", recent_studies=2)


WAYS = {
    "the same": {"indication": "cough"},
    "a longer indication": {"indication": "cough and chest pain for three weeks"},
    "another view": {"indication": "cough", "view": "lateral"},
    "sampled": {"indication": "cough", "decoding": Decoding(temperature=1.0, seed=3)},
    "beams": {"indication": "cough", "decoding": Decoding(beams=3)},
    "one token a pass": {"indication": "cough", "decoding": Decoding(speculative=False)},
    "more tokens": {"indication": "cough", "max_new_tokens": 150},
    "a comparison": {"indication": "cough", "comparison": "2019"},
    "with a lateral radiograph": {"indication": "cough", "lateral": draw_lateral(0)},
    "the first again": {"indication": "cough"},
}


def test_a_study_is_drafted_again_as_if_for_the_first_time(generator: ReportGenerator, forgetful: ReportGenerator):
    film = draw_chest(0)
    first = generator.generate(film, indication="cough", max_new_tokens=30)
    assert not first.image_reused and first.reused_tokens == 0
    for name, request in WAYS.items():
        request = {"max_new_tokens": 30, **request}
        again, fresh = generator.generate(film, **request), forgetful.generate(film, **request)
        assert said(again) == said(fresh), name
        assert not fresh.image_reused and fresh.reused_tokens == 0
        known = name not in ("another view", "with a lateral radiograph")
        assert (again.image_reused, again.reused_tokens > 0) == (known, known), name


def test_what_a_prompt_begins_with_is_not_read_again(generator: ReportGenerator):
    film = draw_chest(0)
    drafts = [generator.generate(film, indication=i, max_new_tokens=20) for i in ("cough", "cough", "cough, fever")]
    queries = generator.bundle.manifest.shapes.num_query_tokens
    assert drafts[1].reused_tokens >= drafts[1].prompt_tokens - 2
    assert queries < drafts[2].reused_tokens < drafts[1].reused_tokens
    longer = generator.generate(film, indication="cough, fever and pain " * 20, max_new_tokens=150)
    assert queries < longer.reused_tokens


def test_other_pixels_under_the_same_name_are_another_study(generator: ReportGenerator, forgetful: ReportGenerator):
    film = load_radiograph(draw_chest(0))
    turned = replace(film, pixels=np.ascontiguousarray(film.pixels[::-1]))
    assert turned.sha256 == film.sha256
    generator.generate(film, max_new_tokens=20)
    report = generator.generate(turned, max_new_tokens=20)
    assert not report.image_reused and said(report) == said(forgetful.generate(turned, max_new_tokens=20))


def test_as_many_studies_are_kept_as_were_asked_for_until_they_are_forgotten(generator: ReportGenerator):
    films = [draw_chest(seed) for seed in range(3)]

    def reused(number: int) -> bool:
        return generator.generate(films[number], max_new_tokens=2).image_reused

    assert [reused(i) for i in (0, 1, 0, 1, 2, 1, 0)] == [False, False, True, True, False, True, False]
    assert len(generator.recent) == 2
    generator.recent.clear()
    assert len(generator.recent) == 0 and not reused(0)
    for wrong in (-1, 65):
        with pytest.raises(ContextError, match="give 0 to 64"):
            Recent(wrong)


def test_a_draft_that_was_given_up_leaves_what_it_read(generator: ReportGenerator, forgetful: ReportGenerator):
    film = draw_chest(0)
    stream = generator.stream(film, indication="cough", max_new_tokens=40)
    next(stream)
    del stream
    again = generator.generate(film, indication="cough", max_new_tokens=40)
    assert again.image_reused
    assert said(again) == said(forgetful.generate(film, indication="cough", max_new_tokens=40))


def test_threads_that_draft_one_study_do_not_disturb_each_other(generator: ReportGenerator, forgetful: ReportGenerator):
    film, indications = draw_chest(0), ["cough", "fever", "pain in the chest", "fall"] * 6
    wanted = {i: said(forgetful.generate(film, indication=i, max_new_tokens=20)) for i in {*indications}}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: said(generator.generate(film, indication=i, max_new_tokens=20)), indications)
        assert [*found] == [wanted[i] for i in indications]


def test_a_decoder_knows_no_more_of_a_prompt_than_it_still_holds(generator: ReportGenerator):
    backend = generator.backend
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, 9, generator.bundle.manifest.shapes.hidden_size)).astype(np.float32)
    other = embeds.copy()
    other[0, 6:] += 1
    used, fresh = backend.new_decoder(20), backend.new_decoder(20)
    used.prefill(embeds)
    used.rewind(4)
    used.append([5, 6, 7])
    assert np.array_equal(used.prefill(other), fresh.prefill(other))
    assert used.reused == 4 and used.length == 9
    assert np.array_equal(used.append([5, 6]), fresh.append([5, 6]))
    used.prefill(other[:, :3])
    assert used.length == 3


@pytest.mark.slow
@needs_default_model
@pytest.mark.parametrize("variant", [None, "int4"])
def test_the_default_model_drafts_a_study_again_in_the_same_words(variant: str | None):
    forgetful, generator = (
        ReportGenerator.from_pretrained(variant=variant, device="cpu", recent_studies=studies) for studies in (0, 1)
    )
    for indication in (None, "cough", "chest pain after a fall; rule out pneumothorax"):
        request = {"indication": indication, "accept_any_image": True}
        again = generator.generate(EXAMPLES / "chest_pa.png", **request)
        assert said(again) == said(forgetful.generate(EXAMPLES / "chest_pa.png", **request))
    assert again.image_reused and again.reused_tokens > forgetful.bundle.manifest.shapes.num_query_tokens
