import json
from pathlib import Path

import pytest
from conftest import REPORTS, call_cli

from cbedge.provenance import provenance
from training.paper_protocol import open_wordnet, score_like_paper, to_markdown

WORDNET = Path("/usr/share/wordnet")


@pytest.fixture
def wordnet(tmp_path: Path):
    try:
        return open_wordnet(None, tmp_path)
    except FileNotFoundError:
        if not (WORDNET / "data.noun").is_file():
            pytest.skip("neither nltk's WordNet nor Debian's wordnet-base is installed")
        return open_wordnet(WORDNET, tmp_path)


def test_synonyms_count_for_meteor_and_not_for_rouge(wordnet):
    reference = "there is a car on the left ."  # of words that nltk's stemmer leaves alone: only those find synonyms
    same, synonym, other = (reference, reference.replace("car", "auto"), reference.replace("car", "hat"))
    scores = score_like_paper([same, synonym, other], [reference] * 3, wordnet).studies
    assert scores["METEOR"][0] > scores["METEOR"][1] - 1e-9 > scores["METEOR"][2]
    assert scores["ROUGE-1"][0] == pytest.approx(1) and scores["ROUGE-1"][1] == pytest.approx(scores["ROUGE-1"][2])


def test_a_folder_without_wordnet_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data\.noun"):
        open_wordnet(tmp_path, tmp_path)


def test_a_drafts_file_is_scored_beside_the_constant(wordnet, tiny_data: Path, tmp_path: Path):
    from training.paper_protocol import evaluate_drafts

    drafts = tmp_path / "drafts.jsonl"
    known = {"study_id": "s", "tags": []}
    pairs = [({"findings": f, "impression": i}, f"FINDINGS: {f} IMPRESSION: {i}") for f, i in REPORTS]
    rows = [known | reference | {"drafts": {"own": draft}} for reference, draft in pairs]
    drafts.write_text("\n".join(map(json.dumps, rows)))
    folder = WORDNET if (WORDNET / "data.noun").is_file() else None
    record = evaluate_drafts(drafts, tiny_data, folder)
    assert record["scores"]["own"]["ROUGE-L"] == pytest.approx(1)
    assert record["scores"]["constant"]["METEOR"] < record["scores"]["own"]["METEOR"]
    assert "ClinicalBLIP as published | 0.570" in to_markdown(provenance("drafts", bundle=False) | record)


def test_what_is_no_drafts_file_is_named(tiny_data: Path, tmp_path: Path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"a": 1}\n')
    done = call_cli("training", "like-paper", wrong, "--data", tiny_data, "--output", tmp_path / "out")
    assert done.returncode == 1 and "line 1" in done.stderr and "Traceback" not in done.stderr
