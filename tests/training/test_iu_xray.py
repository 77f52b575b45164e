from pathlib import Path

import pytest

from training.datasets.iu_xray import clean_reference, read_studies, study_tags
from training.datasets.studies import clean_report
from training.ontology import TAGS


def test_studies_are_read_with_context_and_target(tiny_data: Path):
    studies = read_studies(tiny_data, ("train",))
    assert len(studies) == 12
    assert studies[0].context.indication is None
    assert "XXX" not in (studies[1].context.indication or "") and "cough" in studies[1].context.indication
    assert studies[1].target == (
        "FINDINGS: The heart is enlarged. There is a small left pleural effusion. "
        "IMPRESSION: Cardiomegaly and effusion."
    )
    assert studies[1].tags[0] == 1 and studies[0].tags[0] == 0


def test_no_target_holds_a_mark_but_references_keep_theirs(tiny_data: Path):
    studies = read_studies(tiny_data, ("train", "val", "test"))
    assert not any("XXX" in s.target for s in studies)
    assert any("XXXX" in s.findings for s in studies)


def test_a_marked_sentence_is_dropped_whole_and_x_ray_is_restored():
    assert clean_report("No XXXX of effusion. Normal chest x-XXXX.") == "Normal chest x-ray."
    assert clean_report("XXXX. XXXX XXXX.") is None
    assert clean_report(None) is None


def test_references_are_cleaned_by_r2gens_rules():
    assert clean_reference("1. Heart is normal. 2. Lungs, clear.") == "heart is normal . lungs clear ."
    assert clean_reference("") == ""


def test_tags_come_from_the_curated_problems():
    names = list(TAGS)
    tags = study_tags(["Cardiomegaly/borderline", "Pleural Effusion/right"])
    assert [names[i] for i, flag in enumerate(tags) if flag] == ["abnormal", "cardiomegaly", "effusion"]
    assert sum(study_tags(["normal"])) == 0


def test_a_folder_without_data_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"studies\.jsonl"):
        read_studies(tmp_path, ("train",))
