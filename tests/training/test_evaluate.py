import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call_cli

from cbedge.provenance import describe_bundle
from cbedge.report import Sentence
from training.clinical import clinical_scores, label_reports
from training.controls import (
    best_constant,
    blank,
    commonest_findings,
    consensus,
    neighbours,
    opening_of,
    swapped,
    withheld,
)
from training.datasets.iu_xray import read_studies
from training.evaluate import by_part
from training.findings import LABELS
from training.scoring import METRICS, rouge_matrix, score

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java, which is not installed here")
REPORTS = [
    "the heart is normal .",
    "there is a small effusion on the left .",
    "the lungs are clear .",
    "no acute disease .",
]


@needs_java
def test_a_perfect_draft_scores_full_marks_and_a_wrong_one_does_not():
    result = score(REPORTS, REPORTS)
    perfect = result.corpus
    assert list(perfect) == list(METRICS)
    assert perfect["BLEU-1"] == pytest.approx(1, abs=1e-3) and perfect["ROUGE-L"] == pytest.approx(1)
    assert all(low <= perfect[name] <= high for name, (low, high) in result.intervals().items())
    wrong = score([*REPORTS[1:], REPORTS[0]], REPORTS).corpus
    assert all(wrong[name] < perfect[name] for name in METRICS)


def test_scores_without_drafts_are_refused():
    with pytest.raises(ValueError, match="0 drafts"):
        score([], [])


def test_the_constant_and_the_consensus_are_real_reports_of_the_middle():
    reports = [*REPORTS, "the heart is normal . the lungs are clear ."]
    assert best_constant(reports) == reports[-1]  # it shares words with two others
    assert consensus(["a b c", "a b d", "x y z"]) in ("a b c", "a b d")
    assert rouge_matrix(["a b", ""], ["a b", "c d", "a c b d", ""]).tolist() == [[1, 0, 2 / 3, 0], [0] * 4]


def test_the_commonest_findings_are_those_that_most_reports_affirm():
    reports = ["There is atelectasis. No pneumothorax.", "Cardiomegaly. Small pleural effusion."] * 2
    reports += ["The heart is enlarged. Atelectasis and an effusion.", "There is a fracture.", "No pneumothorax."]
    named = label_reports([commonest_findings(reports)]).matrix[0]
    assert {label for label, flag in zip(LABELS, named, strict=True) if flag} == {
        "Atelectasis",
        "Cardiomegaly",
        "Pleural Effusion",
    }


def test_an_opening_ends_where_other_sentences_begin():
    openings = ("There is atelectasis.", "There is a pleural effusion.")
    draft = "FINDINGS: There is atelectasis. The heart is normal. There is a pleural effusion. IMPRESSION: Atelectasis."
    assert opening_of(draft, openings) == "There is atelectasis."
    assert opening_of("FINDINGS: The lungs are clear. IMPRESSION: Normal.", openings) == ""


def test_findings_are_counted_over_the_sentences_of_each_basis_and_standing():
    sentences = (
        Sentence("There is a pleural effusion.", "findings", 0.4, False, "effusion", "image"),
        Sentence("No pneumothorax.", "findings", 1.0, False, None, "template", False, ("pneumothorax",)),
        Sentence("There is a rib fracture.", "findings", 0.9, False, None, "language", False, ("fracture",)),
        Sentence("There is atelectasis.", "findings", 0.9, False, None, "language"),
        Sentence("Cardiomegaly.", "impression", 0.9, False, None, "language"),
    )
    rows = by_part([SimpleNamespace(sentences=sentences), None])
    assert rows == {
        "sentences of basis image": ["FINDINGS: There is a pleural effusion.", ""],
        "sentences of basis template": ["FINDINGS: No pneumothorax.", ""],
        "sentences of basis language": ["FINDINGS: There is a rib fracture. There is atelectasis.", ""],
        "assessed sentences": ["FINDINGS: There is a pleural effusion. There is atelectasis.", ""],
        "unassessed sentences": ["FINDINGS: No pneumothorax. There is a rib fracture.", ""],
    }
    references = label_reports(["There is a pleural effusion and a fracture. No pneumothorax.", "Lungs clear."])
    f1 = {row: clinical_scores(label_reports(texts), references)["finding_f1"] for row, texts in rows.items()}
    assert f1 == {
        "sentences of basis image": pytest.approx(2 / 3),  # one of the two
        "sentences of basis template": 0.0,
        "sentences of basis language": pytest.approx(0.5),  # one right, one wrong, one missing
        "assessed sentences": pytest.approx(0.5),
        "unassessed sentences": pytest.approx(2 / 3),
    }


def test_the_nearest_image_is_itself():
    features = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    assert (neighbours(features, features, 3)[:, 0] == np.arange(30)).all()


def test_controls_change_the_image_or_the_indication_and_nothing_else(tiny_data: Path):
    studies = read_studies(tiny_data, ("train",))
    for study, request in zip(studies, swapped(studies), strict=True):
        assert request.image != study.image and request.context == study.context
    assert len({request.image for request in swapped(studies)}) == len(studies)
    assert all(
        not isinstance(r.image, Path) and r.context == s.context for r, s in zip(blank(studies), studies, strict=True)
    )
    for study, request in zip(studies, withheld(studies), strict=True):
        assert request.image == study.image
        assert request.context.indication is None and request.context.view == "frontal"


@pytest.mark.slow
@needs_java
def test_evaluate_writes_every_row_and_keeps_what_is_there(
    tiny_data: Path, tiny_run: Path, tiny_bundle: Path, tmp_path: Path
):
    stem = tmp_path / "result"
    arguments = (
        "training",
        "evaluate",
        "--data",
        tiny_data,
        "--model",
        tiny_bundle,
        "--variant",
        "int4",
        "--variant",
        "fp32",
        "--run",
        tiny_run,
        "--image-blind",
        tiny_run / "wording",
        "--output",
        stem,
        "--drafts",
        tmp_path / "drafts.jsonl",
        "--device",
        "cpu",
    )
    done = call_cli(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(stem.with_suffix(".json").read_text())
    assert list(record["scores"]) == [
        "int4 (cbedge)",
        "fp32 (cbedge)",
        "fp32 (torch)",
        "image-blind model (torch)",
        "images swapped",
        "blank image",
        "indication withheld",
        "without template",
        "template alone",
        "sentences of basis image",
        "sentences of basis template",
        "sentences of basis language",
        "assessed sentences",
        "unassessed sentences",
        "opening sentences alone",
        "template of an empty context",
        "constant",
        "three commonest findings, always",
        "nearest image",
        "consensus of 25",
    ]
    assert record["data"] == "IU X-RAY, test" and record["bundle"] == describe_bundle(tiny_bundle)
    assert record["commit"] and {"torch", "onnxruntime"} <= record["versions"].keys()
    assert str(tmp_path) not in stem.with_suffix(".json").read_text()
    assert len((tmp_path / "drafts.jsonl").read_text().splitlines()) == 4
    rescored = tmp_path / "rescored"
    scored = ("training", "evaluate", "--data", tiny_data, "--model", tiny_bundle, "--output", rescored)
    done = call_cli(*scored, "--from-drafts", tmp_path / "drafts.jsonl")
    assert done.returncode == 0, done.stderr
    rescored_record = json.loads(rescored.with_suffix(".json").read_text())
    assert rescored_record["looks"] == record["looks"] and list(rescored_record["scores"]) == list(record["scores"])
    for row in [*record["scores"]][:-2]:  # the last two are retrieved with the run's image side there
        assert rescored_record["scores"][row] == record["scores"][row]
        assert rescored_record["clinical"]["scores"][row] == record["clinical"]["scores"][row]
    lines = (tmp_path / "drafts.jsonl").read_text().splitlines()
    assert {json.loads(line)["bundle"] for line in lines} == {record["bundle"]["sha256"]}
    (tmp_path / "others.jsonl").write_text("\n".join(lines).replace(record["bundle"]["sha256"], "0" * 64))
    other = call_cli(*scored[:-1], tmp_path / "other", "--from-drafts", tmp_path / "others.jsonl")
    assert other.returncode == 1 and "drafts of the bundle 000000000000…" in other.stderr
    again = call_cli(*arguments)
    assert again.returncode == 1 and "--force" in again.stderr
    blind = call_cli(
        "training",
        "evaluate",
        "--data",
        tiny_data,
        "--image-blind",
        tiny_run / "wording",
        "--output",
        tmp_path / "blind",
        "--device",
        "cpu",
    )
    assert blind.returncode == 0, blind.stderr
    alone = json.loads((tmp_path / "blind.json").read_text())
    assert list(alone["scores"]) == ["image-blind model (torch)", "constant", "three commonest findings, always"]
    assert not alone["looks"] and alone["bundle"] is None
    assert "images are swapped" not in (tmp_path / "blind.md").read_text()


def _write_drafts(path: Path, drafts: list[str]) -> Path:
    lines = [
        {
            "study_id": str(i),
            "indication": None,
            "findings": reference,
            "impression": "",
            "tags": [],
            "drafts": {"model": f"FINDINGS: {draft}"},
        }
        for i, (reference, draft) in enumerate(zip(REPORTS * 5, drafts, strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@needs_java
def test_comparing_two_models_says_which_is_better_and_whether_by_chance(tmp_path: Path):
    good = _write_drafts(tmp_path / "good.jsonl", REPORTS * 5)
    poor = _write_drafts(tmp_path / "poor.jsonl", [REPORTS[2]] * 20)
    done = call_cli("training", "compare", good, poor, "--output", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    measures = json.loads((tmp_path / "result.json").read_text())["measures"]
    assert measures["CIDEr"]["difference"] > 0 and measures["CIDEr"]["p"] < 0.05
    assert measures["F1 of 13 findings, micro"]["first"] == 1 and measures["F1 of 13 findings, micro"]["second"] == 0
    wrong = call_cli("training", "compare", good, poor, "--first-row", "x", "--output", tmp_path / "other")
    assert wrong.returncode == 1 and "no drafts of 'x'" in wrong.stderr
