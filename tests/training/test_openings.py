from pathlib import Path

import numpy as np
import pytest

from cbedge.findings.image_findings import ImageFindings
from cbedge.prompt import ClinicalContext, build_opening
from training.batches import collate
from training.config import load_config
from training.datasets import Study
from training.ontology import OPENINGS, TAGS
from training.openings import Opener
from training.settings import ConfigError

REPORT = (
    "FINDINGS: The heart is moderately enlarged. Lungs are clear. There is cardiomegaly and a rib fracture. "
    "No pleural effusion. IMPRESSION: Cardiomegaly."
)


def study(target: str, *tags: str) -> Study:
    values = tuple(int(tag in tags) for tag in TAGS)
    return Study("s", "train", Path("x.png"), ClinicalContext(view="frontal"), target, "", "", values)


def test_a_report_goes_on_after_the_sentences_of_what_is_told():
    opener, rng = Opener(OPENINGS, 1.0), np.random.default_rng(0)
    known = study(REPORT, "abnormal", "cardiomegaly", "fracture")
    begun, rest = opener(known, ("cardiomegaly", "fracture"), known.tags, rng)
    told = ImageFindings(TAGS, (0.5,) * len(TAGS), tuple(OPENINGS.get(name, "") for name in TAGS))
    assert begun == "".join(build_opening([*told.open(("cardiomegaly", "fracture")).values()]))
    assert begun == "FINDINGS: The heart is enlarged."
    assert rest == (
        " Lungs are clear. There is cardiomegaly and a rib fracture. No pleural effusion. IMPRESSION: Cardiomegaly."
    )
    both = opener(known, ("cardiomegaly", "effusion"), (*known.tags[:2], 1, *known.tags[3:]), rng)
    assert both[0] == "FINDINGS: The heart is enlarged. There is a pleural effusion."
    assert "No pleural effusion" not in both[1]


@pytest.mark.parametrize("told", [None, (), ("effusion",), ("fracture",), ("other abnormality",)])
def test_what_is_not_told_or_not_so_opens_nothing(told: tuple[str, ...] | None):
    known = study(REPORT, "abnormal", "cardiomegaly", "fracture")
    assert Opener(OPENINGS, 1.0)(known, told, known.tags, np.random.default_rng(0)) == ("", REPORT)


def test_nothing_is_opened_by_chance_or_without_findings():
    known, alone = study(REPORT, "cardiomegaly"), study("IMPRESSION: Cardiomegaly.", "cardiomegaly")
    rng = np.random.default_rng(0)
    assert Opener(OPENINGS, 0.0)(known, ("cardiomegaly",), known.tags, rng)[0] == ""
    assert Opener(OPENINGS, 1.0)(alone, ("cardiomegaly",), alone.tags, rng) == ("", alone.target)
    share = [bool(Opener(OPENINGS, 0.5)(known, ("cardiomegaly",), known.tags, rng)[0]) for _ in range(200)]
    assert 60 < sum(share) < 140


def test_what_a_report_begins_with_is_read_and_not_learnt(tiny_checkpoint: Path):
    import torch

    from training.base import load_model

    parts = load_model(str(tiny_checkpoint), tiny_checkpoint)
    known = study(" The lungs are clear.", "cardiomegaly")
    pixels = torch.zeros(1, 3, 224, 224)
    plain, opened = (
        collate(parts, [known], [known.context], pixels, [("cardiomegaly",)], (), begun)
        for begun in ([], ["FINDINGS: The heart is enlarged."])
    )
    learnt = [batch.labels[batch.labels != -100].tolist() for batch in (plain, opened)]
    assert learnt[0] == learnt[1]
    text = parts.tokenizer.decode(opened.input_ids[0][parts.model.config.num_query_tokens :])
    assert "FINDINGS: The heart is enlarged. The lungs are clear." in text


def test_a_report_can_be_opened_by_what_is_told_alone(tmp_path: Path):
    config = tmp_path / "run.yaml"
    stages = "[{name: language, losses: {language: 1.0}, open_share: 0.5}]"
    config.write_text(f"base: mini\ndata: d\noutput: o\nstages: {stages}\n")
    with pytest.raises(ConfigError, match="open_share needs tell_findings"):
        load_config(config)
