"""Evaluation on films of another hospital: splits by patient, figures that can be checked by hand, denials."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from training.__main__ import app
from training.encoder.labels import FINDINGS, nih_labels
from training.external import (
    LabelledFilm,
    Outcome,
    calibration_error,
    external_record,
    parse_external,
    read_films,
    to_markdown,
)


def _outcome(number: int, labels: list[str], score: float, text: str = "", accepted: bool = True) -> Outcome:
    film = LabelledFilm(Path(f"{number}.jpg"), str(number), nih_labels(labels))
    return Outcome(film, accepted, {"abnormal": 0.5, "effusion": score}, text)


def test_figures_of_a_finding_are_those_that_a_hand_counts():
    outcomes = [_outcome(i, ["Effusion"], 0.6 + i / 100) for i in range(10)]
    outcomes += [_outcome(20 + i, [], 0.7 if i < 2 else 0.1, accepted=i > 0) for i in range(10)]
    points = {
        "balanced": {"abnormal": 0.4, "effusion": 0.5, "device": 0.5},
        "specific": {"abnormal": 0.6, "effusion": 0.65},
    }
    record = external_record(outcomes, points)
    row = record["findings"]["effusion"]
    assert (row["positives"], row["films"]) == (10, 20)
    assert row["operating_points"] == {
        "balanced": {"threshold": 0.5, "sensitivity": 1.0, "specificity": 0.8},
        "specific": {"threshold": 0.65, "sensitivity": 0.5, "specificity": 0.8},
    }
    assert "| 1.00 / 0.80 | 0.50 / 0.80 |" in "\n".join(to_markdown("nih_cxr14", record))
    assert row["auc"][0] == pytest.approx(0.8) and row["auc"][1] < 0.8 < row["auc"][2]
    assert (record["accepted"], record["films"], record["patients"]) == (19, 20, 20)
    assert "device" not in record["findings"]  # the NIH has no such label
    assert record["findings"]["abnormal"]["auc"][0] == 0.5
    assert record["mean_auc"] == {"findings": ["abnormal", "effusion"], "value": pytest.approx(0.65)}


def test_scores_that_are_shares_of_positives_are_calibrated():
    truth = np.array([True] * 3 + [False] * 7)
    assert calibration_error(truth, np.full(10, 0.3)) == pytest.approx(0)
    assert calibration_error(truth, np.full(10, 0.9)) == pytest.approx(0.6)


def test_a_label_that_a_draft_only_denies_is_counted():
    texts = ["No pneumothorax.", "Left pneumothorax. No right pneumothorax.", "Heart normal."]
    outcomes = [_outcome(i, ["Pneumothorax"], 0.1, f"FINDINGS: {text}") for i, text in enumerate(texts)]
    outcomes += [_outcome(10 + i, ["Effusion"] * (i < 5), 0.5) for i in range(10)]
    record = external_record(outcomes, {"default": {"abnormal": 0.4, "effusion": 0.5}})
    assert record["denied"]["pneumothorax"] == {
        "films": 3,
        "denied": 1,
        "denied_unmarked": 0,
        "contradicted": 2,
        "contradicted_unmarked": 0,
    }
    assert "| pneumothorax | 3 | 1 | 0 | 2 | 0 |" in to_markdown("nih_cxr14", record)


def test_a_denial_without_a_mark_is_counted_apart():
    texts, unmarked = ["No pneumothorax. Heart normal."] * 2, [(), ("No pneumothorax.",)]
    outcomes = [replace(_outcome(i, ["Pneumothorax"], 0.1, texts[i]), unmarked=unmarked[i]) for i in range(2)]
    outcomes += [_outcome(10 + i, ["Effusion"] * (i < 5), 0.5) for i in range(10)]
    row = external_record(outcomes, {"default": {"abnormal": 0.4, "effusion": 0.5}})["denied"]["pneumothorax"]
    assert [*row.values()] == [2, 2, 1, 2, 1]


def test_films_of_a_split_are_of_other_patients(tmp_path: Path):
    rows = [
        {"file": f"{i}.jpg", "split": "test" if i % 4 == 0 else "train", "patient": str(i // 2 * 2), "labels": ["Mass"]}
        for i in range(400)
    ]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test, validation = (read_films("nih_cxr14", tmp_path, split) for split in ("test", "val"))
    assert len(test) == 100 and 20 < len(validation) < 70
    assert test[0].labels[FINDINGS.index("nodule")] == 1 and test[0].file == tmp_path / "images" / "0.jpg"


@pytest.mark.parametrize(
    ("option", "told"), [("nih", "give COLLECTION=FOLDER"), ("nih_cxr14=", "give COLLECTION=FOLDER")]
)
def test_an_option_of_another_form_is_refused(option: str, told: str):
    with pytest.raises(ValueError, match=told):
        parse_external(option)
    with pytest.raises(ValueError, match="unknown external collection 'chexpert'"):
        read_films("chexpert", Path("x"))


def test_films_of_another_hospital_are_evaluated_alone(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    rows = [
        {"file": chest_png.name, "split": "test", "patient": str(i), "labels": ["Effusion"] * (i < 5)}
        for i in range(10)
    ]
    folder = tmp_path / "films"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / chest_png.name).write_bytes(chest_png.read_bytes())
    (folder / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["evaluate", "--model", tiny_bundle, "--output", tmp_path / "away"]
    runner = CliRunner()
    done = runner.invoke(app, [*map(str, arguments), "--external", f"nih_cxr14={folder}"], catch_exceptions=False)
    assert done.exit_code == 0
    record = json.loads((tmp_path / "away.json").read_text())
    row = record["external"]["nih_cxr14"]["findings"]["effusion"]
    assert (row["films"], row["positives"], row["auc"][0]) == (10, 5, 0.5) and [*row["operating_points"]] == ["default"]
    assert "10 films of 10 patients" in (tmp_path / "away.md").read_text()
    with pytest.raises(ValueError, match="nothing to evaluate without --data"):
        runner.invoke(app, [*map(str, arguments[:3]), "--output", str(tmp_path / "x")], catch_exceptions=False)
