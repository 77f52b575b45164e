import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_default_model
from scipy.special import expit

from cbedge.bundles.bundle import open_bundle
from cbedge.findings.finding_reader import FRONTAL, PAIRED_FRONTAL, PAIRED_LATERAL
from cbedge.findings.image_findings import ImageFindings
from export.card import model_card
from export.finding_features import IU_XRAY, NIH, FilmFeatures
from export.finding_fit import Fitted, fit_findings
from export.revision import Revision
from training.encoder.labels import FINDINGS, nih_labels
from training.external import LabelledFilm, Outcome, external_record

HEAD = ImageFindings(("abnormal", "cardiomegaly", "fracture"), (0.4, 0.5, 0.6), ("", "The heart is enlarged.", ""))
SIGNAL = {"abnormal": 0, "cardiomegaly": 1, "pneumothorax": 2}  # finding → feature that shows it


@pytest.fixture(scope="module")
def films() -> FilmFeatures:
    """Films of 1,000 studies in two views and of 400 patients elsewhere; three findings depend on one feature each."""
    rng = np.random.default_rng(0)
    collection = np.array([IU_XRAY] * 2000 + [NIH] * 400)
    group = np.array([*(f"study {i // 2}" for i in range(2000)), *(f"patient {i}" for i in range(400))])
    view = np.array([*(["frontal", "lateral"] * 1000), *["frontal"] * 400])
    split = np.array([*(["train"] * 1400 + ["val"] * 600), *["train"] * 400])
    hidden = rng.normal(size=(len(group), 3)).astype(np.float32)
    hidden[1:2000:2] = hidden[0:2000:2]  # both views show the same
    labels = np.full((len(group), len(FINDINGS)), -1, np.int8)
    for name, column in SIGNAL.items():
        chance = expit(3 * hidden[:, column] - 1)
        labels[:, FINDINGS.index(name)] = chance > rng.uniform(size=len(group))
    labels[1:2000:2] = labels[0:2000:2]
    labels[:2000, FINDINGS.index("fracture")] = rng.uniform(size=2000) < 0.3  # nothing shows it
    labels[:2000, FINDINGS.index("spine")] = rng.uniform(size=2000) < 0.3
    pooled = np.concatenate([hidden, rng.normal(size=(len(group), 5))], 1) + rng.normal(size=(len(group), 8)) * 0.1
    logits = rng.normal(size=(len(group), 3)).astype(np.float32)
    names = np.array([f"{i}.png" for i in range(len(group))])
    position = np.full(len(group), "")
    return FilmFeatures(pooled.astype(np.float16), logits, collection, split, group, view, position, names, labels)


@pytest.fixture(scope="module")
def fitted(films: FilmFeatures) -> Fitted:
    return fit_findings(films, HEAD)


def test_what_the_features_show_is_read_and_calibrated_in_both_places(fitted: Fitted):
    for place in ("home", "away"):
        for name in ("abnormal", "cardiomegaly", "pneumothorax"):
            row = fitted.record[place][name]
            assert row["auc"][0] > 0.85 and row["calibration_error"] < 0.08, (place, name)
            assert abs(row["mean_probability"] - row["positives"] / row["films"]) < 0.06
    assert fitted.record["home"]["fracture"]["auc"][1] < 0.6


def test_findings_of_the_head_stay_first_and_others_have_to_earn_their_place(fitted: Fitted):
    assert fitted.findings.names == (*HEAD.names, "pneumothorax")
    assert fitted.findings.head.names == HEAD.names and fitted.findings.head.thresholds == HEAD.thresholds
    assert fitted.findings.openings == ("", "The heart is enlarged.", "", "")
    assert fitted.findings.denials[3] and fitted.findings.operating_point == "balanced"


def test_standings_are_the_figures_of_the_record(fitted: Fitted):
    for name, standing in zip(fitted.findings.names, fitted.findings.standings, strict=True):
        home = fitted.record["home"][name]
        assert standing.home is not None and [standing.home.auc, standing.home.low, standing.home.high] == home["auc"]
        assert (standing.home.films, standing.home.positives) == (home["films"], home["positives"]) and home[
            "films"
        ] == 300
        assert (standing.away is None) == (name == "fracture")
        assert standing.is_assessed(familiar=True) == (name != "fracture")


def test_what_another_arithmetic_changes_is_hardly_read(films: FilmFeatures):
    """Half of what shows cardiomegaly is also in a feature that rounding changes: the reader takes the other."""
    pooled = films.pooled.astype(np.float32)
    pooled[:, 7] = pooled[:, SIGNAL["cardiomegaly"]] + np.random.default_rng(1).normal(size=len(pooled)) * 0.1
    coarse = np.arange(0, len(pooled), 20)
    differences = np.zeros((len(coarse), pooled.shape[1] + films.logits.shape[1]), np.float32)
    differences[:, 7] = np.random.default_rng(2).normal(size=len(coarse))
    plain = replace(films, pooled=pooled.astype(np.float16))
    penalized = replace(plain, coarse=coarse, differences=differences)
    (before, after) = (fit_findings(some, HEAD).reader.weights[FRONTAL, 1, 1:] for some in (plain, penalized))
    assert abs(after[7]) < 0.2 * abs(before[7]) and after[SIGNAL["cardiomegaly"]] > before[SIGNAL["cardiomegaly"]]


def test_thresholds_rise_from_sensitive_to_specific(fitted: Fitted, films: FilmFeatures):
    points = fitted.findings.operating_points
    assert [*points] == ["sensitive", "balanced", "specific"]
    for low, middle, high in zip(*points.values(), strict=True):
        assert 0 < low <= middle <= high < 1
    rows = films.where(NIH, "frontal")
    chances = expit(read(fitted, films, rows)[:, 1])
    truth = films.labels[rows, FINDINGS.index("cardiomegaly")] == 1
    assert (chances[truth] >= points["sensitive"][1]).mean() == pytest.approx(0.9, abs=0.05)
    assert (chances[~truth] < points["specific"][1]).mean() == pytest.approx(0.95, abs=0.04)


def test_the_reader_of_the_bundle_says_what_was_fitted(fitted: Fitted, films: FilmFeatures):
    rows = films.where(IU_XRAY, "frontal", "val")
    single = read(fitted, films, rows)[:, 0]
    truth = films.labels[rows, FINDINGS.index("abnormal")] == 1
    assert expit(single).mean() == pytest.approx(truth.mean(), abs=0.06)
    pairs = [
        fitted.reader.logits(
            [films.pooled[i : i + 1], films.pooled[i + 1 : i + 2]], [*films.logits[i : i + 2]], "frontal"
        )
        for i in rows
    ]
    assert np.corrcoef(np.array(pairs)[:, 0], single)[0, 1] > 0.95
    assert expit(np.array(pairs)[:, 0]).mean() == pytest.approx(truth.mean(), abs=0.06)
    assert (fitted.reader.weights[[PAIRED_FRONTAL, PAIRED_LATERAL], 0, 1] > 0).all()


def test_the_same_films_give_the_same_readers(fitted: Fitted, films: FilmFeatures):
    again = fit_findings(films, HEAD)
    assert again.record == fitted.record and np.array_equal(again.reader.weights, fitted.reader.weights)


def test_features_are_kept(films: FilmFeatures, tmp_path: Path):
    films.save(tmp_path / "features.npz")
    again = FilmFeatures.load(tmp_path / "features.npz")
    assert np.array_equal(again.pooled, films.pooled) and again.name.tolist() == films.name.tolist()


def read(fitted: Fitted, films: FilmFeatures, rows: np.ndarray) -> np.ndarray:
    assert FRONTAL == 0
    return np.array([fitted.reader.logits([films.pooled[i : i + 1]], [films.logits[i]], "frontal") for i in rows])


@needs_default_model
def test_the_card_shows_the_figures_of_every_finding_and_of_other_hospitals(tmp_path: Path):
    manifest = open_bundle().manifest
    outcomes = [
        Outcome(
            LabelledFilm(Path("1.jpg"), str(i), nih_labels(["Effusion"] * (i < 5))),
            True,
            {"effusion": i / 10},
            "Normal.",
        )
        for i in range(10)
    ]
    record = external_record(outcomes, {"balanced": {"effusion": 0.45}})
    quality = tmp_path / "away.json"
    quality.write_text(json.dumps({"external": {"nih_cxr14": record}}))
    revision = Revision(open_bundle())
    revision.set_quality(quality)
    assert revision.manifest.quality["scores"] == manifest.quality["scores"]
    card = model_card(revision.manifest, None)
    standing = manifest.image_findings.standings[1].home
    assert f"| cardiomegaly | {standing.auc:.3f} ({standing.low:.3f} to {standing.high:.3f}), 32 of 298 |" in card
    assert "**Test films: nih_cxr14: 10 films of 10 patients**" in card
    assert "| effusion | 0.000 (0.000 to 0.000) | 0.859 | 0.00 / 0.00 | " in card
