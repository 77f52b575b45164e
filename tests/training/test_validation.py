from pathlib import Path

import numpy as np
import pytest

from cbedge.findings.image_findings import OTHER
from cbedge.prompt import ClinicalContext
from training.batches import StudyTags, prompted_findings
from training.datasets.studies import Study
from training.ontology import TAGS
from training.validation import choose_thresholds, tag_auc

NAMES = ("cardiomegaly", "effusion")


def frontal(scores: np.ndarray) -> np.ndarray:
    """Logits of studies without a lateral radiograph, [studies, 2, tags], for their scores."""
    logits = np.log(np.clip(scores, 1e-6, 1 - 1e-6) / (1 - np.clip(scores, 1e-6, 1 - 1e-6)))
    return np.stack([logits, np.full(scores.shape, np.nan)], 1)


def tags_of(*present: str, unknown: bool = False) -> list[int]:
    return [-1] * len(TAGS) if unknown else [int(tag in present) for tag in TAGS]


def test_curated_tags_are_told_in_the_form_of_inference():
    assert prompted_findings(tags_of("abnormal", "effusion", "spine"), NAMES) == ("effusion",)
    assert prompted_findings(tags_of("abnormal", "spine"), NAMES) == (OTHER,)
    assert prompted_findings(tags_of(), NAMES) == ()
    assert prompted_findings(tags_of(unknown=True), NAMES) is None
    assert prompted_findings(tags_of("abnormal", "effusion"), ()) is None


def test_what_the_report_itself_names_can_be_told():
    def study(target: str) -> Study:
        return Study(target, "train", Path("x.png"), ClinicalContext(), target, "", "", tuple(tags_of("hernia")))

    texts = (
        "FINDINGS: The heart is enlarged. No pleural effusion. IMPRESSION: Small effusion.",
        "IMPRESSION: Small left pleural effusion.",
        "FINDINGS: The lungs are clear.",
        "",
    )
    source = StudyTags("report")
    told = [prompted_findings(tags, NAMES) for tags in source([study(text) for text in texts])]
    assert told == [("cardiomegaly",), ("effusion",), (), None]
    assert source([study(texts[0])])[0] == source([study(texts[0])])[0]
    assert StudyTags("tags")([study(texts[0])]) == [tuple(tags_of("hernia"))]


def test_training_withholds_and_distorts_a_little():
    rng = np.random.default_rng(0)
    told = [prompted_findings(tags_of("abnormal", "effusion"), NAMES, 0.8, rng) for _ in range(2000)]
    assert sum(t is None for t in told) == pytest.approx(400, abs=60)
    assert sum(t == ("effusion",) for t in told) > 1300
    assert any(t == (OTHER,) for t in told) and any(t and "cardiomegaly" in t for t in told)


def test_thresholds_find_what_can_be_told_apart_on_validation():
    rng = np.random.default_rng(1)
    tags = np.zeros((400, len(TAGS)))
    sick = rng.random(400) < 0.4
    tags[:, 0] = sick
    heart = TAGS.index("cardiomegaly")
    tags[sick & (rng.random(400) < 0.3), heart] = 1
    scores = np.clip(0.3 * tags + 0.2 + 0.05 * rng.standard_normal(tags.shape), 0, 1)
    findings = choose_thresholds(frontal(scores), tags, NAMES, {"cardiomegaly": "The heart is enlarged."})
    # Of an effusion there is no example to choose a threshold by.
    assert findings.names == ("abnormal", "cardiomegaly") and not findings.lateral_shares
    assert findings.open(("cardiomegaly",)) == {"cardiomegaly": "The heart is enlarged."} and not findings.open(())
    columns = [TAGS.index(n) for n in findings.names]
    told = ["cardiomegaly" in findings.read(row[columns]) for row in scores]
    assert np.mean(np.array(told) == (tags[:, heart] == 1)) > 0.95
    assert tag_auc(scores, tags)["auc_cardiomegaly"] > 0.99


def test_the_view_that_shows_a_finding_better_weighs_more():
    rng = np.random.default_rng(2)
    tags = (rng.random((300, len(TAGS))) < 0.3).astype(float)
    heart, effusion = (TAGS.index(name) for name in NAMES)
    views = rng.standard_normal((300, 2, len(TAGS)))
    views[:, 0, heart] += 3 * tags[:, heart]
    views[:, 1, effusion] += 3 * tags[:, effusion]
    views[:50, 1] = np.nan  # without a lateral radiograph
    findings = choose_thresholds(views, tags, NAMES, {})
    assert findings.lateral_shares[1:] == (0.25, 0.75)
    joined = findings.join(views[50:, 0][:, [0, heart, effusion]], views[50:, 1][:, [0, heart, effusion]])
    assert np.allclose(joined[:, 2], 0.25 * views[50:, 0, effusion] + 0.75 * views[50:, 1, effusion])


def test_unknown_tags_count_for_nothing():
    tags = np.full((20, len(TAGS)), -1.0)
    with pytest.raises(ValueError, match="some validation studies must be abnormal and some normal"):
        choose_thresholds(frontal(np.full(tags.shape, 0.5)), tags, NAMES, {})
    assert tag_auc(np.full(tags.shape, 0.5), tags) == {}
