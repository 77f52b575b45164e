"""A hospital's own studies.jsonl: where it comes from, its tags, and what is wrong with it, told before training."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call_cli

from export.bundle import Origin
from training.config import load_config
from training.datasets import find_provenance, open_studies
from training.datasets.iu_xray import read_studies, records
from training.datasets.provenance import load_training_data
from training.ontology import TAGS
from training.preflight import check_run
from training.train import run
from training.validation import choose_thresholds

LINES = "studies.jsonl"
TAG_KEYS = ("problems", "mesh_major", "mesh_automatic")


@pytest.fixture
def own(tiny_data: Path, tmp_path: Path) -> Path:
    """Twenty studies without any tag."""
    folder = Path(shutil.copytree(tiny_data, tmp_path / "clinic"))
    edit(folder, lambda number, row: row.update({key: [] for key in TAG_KEYS}))
    return folder


def edit(folder: Path, change: Callable[[int, dict], object]) -> None:
    """Change each row of studies.jsonl in place; rows are numbered from 1."""
    rows = [json.loads(line) for line in (folder / LINES).read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        change(number, row)
    (folder / LINES).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def train(config: Path, folder: Path, output: Path):  # type: ignore[no-untyped-def]
    return call_cli("training", "run", "--config", config, "--data", folder, "--output", output, "--max-steps", 1)


def test_data_without_a_name_are_called_unnamed_and_never_iu_x_ray(own: Path, tiny_config: Path, tmp_path: Path):
    record = check_run(load_config(tiny_config, data=own, output=tmp_path / "run")).record
    assert record["name"] == "unnamed data at clinic" and record["licence"] == "not stated"
    assert record["splits"] == "train 12, val 4" and record["studies"] == "16"
    assert record["tags"] == "derived from report text in 16 of 16 studies"
    assert len(record["study_list_sha256"]) == 64


def test_dataset_json_names_the_data_of_the_run(own: Path, tiny_config: Path, tmp_path: Path):
    (own / "dataset.json").write_text(json.dumps({"name": "Clinic A", "licence": "internal", "citation": "none yet"}))
    config = tmp_path / "one.yaml"
    config.write_text(tiny_config.read_text().split("  - name: wording")[0])
    folder = run(load_config(config, data=own, output=tmp_path / "run"), max_steps=1)
    (record,) = load_training_data(folder) or []
    assert (record["name"], record["licence"]) == ("Clinic A", "internal")
    assert Origin.of("checkpoint", [folder]).training_data == [record]
    assert Origin.of("checkpoint", [folder / "align"]).training_data == [record]


def test_a_run_without_a_record_of_its_data_is_said_to_have_none(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"base": "mini", "stages": []}')
    (record,) = Origin.of("mini", [tmp_path]).training_data
    assert record["name"] == "data that the run did not record"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"licence": "x"}', "no name"),
        ('{"nam": "x"}', "'nam'"),
        ('{"name": 3}', "name must be a string"),
    ],
)
def test_a_wrong_dataset_json_is_refused(own: Path, text: str, reason: str):
    (own / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=rf"dataset\.json.*{reason}"):
        find_provenance(own)


def test_iu_x_ray_is_recognised_by_its_reports_alone(own: Path, monkeypatch: pytest.MonkeyPatch):
    from training.datasets import iu_xray

    edit(own, lambda number, row: row.update(study_id=f"CXR{number}"))
    assert find_provenance(own).name == "unnamed data at clinic"
    texts = {1: "7f66f9bcb1b5"}  # another report than IU X-RAY's CXR1
    monkeypatch.setattr(iu_xray, "_FINGERPRINTS", {f"CXR{n}": texts.get(n, "0" * 12) for n in range(1, 9)})
    assert not iu_xray.is_recognised(own)


def test_tags_are_read_from_the_report_where_none_are_given(own: Path):
    studies = read_studies(own, ("train",))
    named = [[TAGS[i] for i, tag in enumerate(study.tags) if tag == 1] for study in studies[:4]]
    assert named[0] == [] and studies[0].tags == (0,) * len(TAGS)
    assert named[1] == ["abnormal", "cardiomegaly", "effusion"] and "opacity" in named[3]
    assert all(study.tags_derived for study in studies)


def test_given_tags_are_kept(tiny_data: Path):
    studies = open_studies(tiny_data, ("train",))
    assert not any(study.tags_derived for study in studies)


def test_derived_tags_train_and_are_told(own: Path, tiny_config: Path, tmp_path: Path):
    config = tmp_path / "one.yaml"
    config.write_text(tiny_config.read_text().split("  - name: wording")[0])
    done = train(config, own, tmp_path / "run")
    assert done.returncode == 0 and "derived from report text" in " ".join(done.stderr.split())
    rows = (tmp_path / "run" / "align" / "loss.csv").read_text().splitlines()
    assert float(rows[1].split(",")[rows[0].split(",").index("tags")]) > 0.1


def test_a_finding_that_validation_cannot_judge_is_left_out_and_said(own: Path, tiny_config: Path, tmp_path: Path):
    def no_effusion(number: int, row: dict) -> None:
        if row["split"] == "val":
            row["findings"] = row["findings"].replace("There is a small left pleural effusion.", "")
            row["impression"] = row["impression"].replace(" and effusion", "")

    edit(own, no_effusion)
    checked = check_run(load_config(tiny_config, data=own, output=tmp_path / "run"))
    assert checked.stages[-1].tell_findings == ("cardiomegaly", "opacity")
    assert any("effusion" in note and "no threshold" in note for note in checked.notes)


def test_a_threshold_is_not_chosen_without_examples_of_both_kinds():
    logits = np.random.default_rng(0).normal(size=(8, 2, len(TAGS)))
    tags = np.zeros((8, len(TAGS)), int)
    tags[:3, [0, TAGS.index("effusion")]] = 1
    chosen = choose_thresholds(logits, tags, ("cardiomegaly", "effusion"), {})
    assert chosen.names == ("abnormal", "effusion") and len(chosen.thresholds) == 2
    with pytest.raises(ValueError, match="abnormal"):
        choose_thresholds(logits, tags * 0, ("effusion",), {})


def test_the_example_of_the_tutorial_is_read_and_views_are_named_as_in_a_draft(tmp_path: Path):
    page = (ROOT / "docs" / "building-a-model.md").read_text(encoding="utf-8")
    row = json.loads(re.findall(r"```json\n(.*?)```", page, re.S)[0])
    (tmp_path / "images").mkdir()
    names = {"PA": "frontal", "ap": "frontal", "LAT": "lateral", "LL": "lateral", "frontal": "frontal", None: None}
    row["images"] += [{"file": f"{name}.png", "view": name} for name in names]
    for image in row["images"]:
        (tmp_path / "images" / image["file"]).touch()
    (tmp_path / LINES).write_text(json.dumps(row), encoding="utf-8")
    (record,) = records(tmp_path)
    assert [image.view for image in record.images] == ["frontal", *names.values()]


def only_normal(number: int, row: dict) -> None:
    row.update(findings="The lungs are clear.", impression="Normal chest.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n, row: row.pop("split") if n == 3 else None, "line 3: 'split' is missing"),
        (lambda n, row: (row.pop("findings"), row.pop("impression")) if n == 2 else None, "line 2: 'findings' and"),
        (lambda n, row: row.update(split="train"), "no validation study"),
        (lambda n, row: row.update(split="val"), "no training study"),
        (lambda n, row: row.update(split="dev") if n == 4 else None, "line 4: unknown split 'dev'"),
        (lambda n, row: row.update(patient_id=n % 12), "line 13: its patient is in split val, but in train in line 1"),
        (lambda n, row: row.update(study_id="S0") if n == 5 else None, "line 5: study_id 'S0' also occurs in line 1"),
        (lambda n, row: row["images"][0].update(file="0.jpg") if n == 5 else None, "line 5: image 0.jpg also belongs"),
        (lambda n, row: row["images"][0].update(file="none.jpg") if n == 6 else None, "line 6: image none.jpg is"),
        (lambda n, row: row.update(images=[{"view": "frontal"}]) if n == 6 else None, "line 6: images must be a list"),
        (lambda n, row: row["images"][0].update(view="up") if n == 6 else None, "line 6: unknown view; give frontal"),
        (lambda n, row: row.update(findings=[]) if n == 6 else None, "line 6: findings must be a string or null"),
        (lambda n, row: row.update(findings="", impression=None), "no validation study"),
        (only_normal, "tags loss cannot learn anything"),
        (lambda n, row: only_normal(n, row) if row["split"] == "val" else None, "is known to be abnormal"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line_before_anything_is_written(
    own: Path, tiny_config: Path, tmp_path: Path, change: Callable[[int, dict], object], reason: str
):
    edit(own, change)
    done = train(tiny_config, own, tmp_path / "run")
    assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda own: (own / "images" / "3.jpg").write_bytes(b"no image"), "line 4: 3.jpg"),
        (lambda own: (own / LINES).write_bytes((own / LINES).read_bytes() + "\n\xe4".encode("latin-1")), "line 21, is"),
        (lambda own: (own / LINES).write_text("{}"), "line 1: 'study_id' is missing"),
        (lambda own: (own / LINES).write_text("[1]"), "line 1, is not a study"),
        (lambda own: (own / LINES).write_text("\n\n"), "no validation study"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    own: Path, tiny_config: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
):
    spoil(own)
    done = train(tiny_config, own, tmp_path / "run")
    assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_blank_lines_crlf_and_a_byte_order_mark_are_read(own: Path):
    expected = read_studies(own, ("train",))
    text = (own / LINES).read_text(encoding="utf-8").replace("\n", "\r\n\r\n")
    (own / LINES).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert read_studies(own, ("train",)) == expected


def test_studies_without_a_report_are_counted_and_named(own: Path, tiny_config: Path, tmp_path: Path):
    edit(own, lambda n, row: row.update(findings=" ", impression="") if n == 2 else None)
    checked = check_run(load_config(tiny_config, data=own, output=tmp_path / "run"))
    assert checked.record["studies"] == "15"
    assert any(note.startswith("1 studies have no report") and "line 2" in note for note in checked.notes)
