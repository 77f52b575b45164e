"""Fit and calibrate the readers of findings, choose their operating points, and measure how well they read.

A logistic regression reads each finding from pooled features and the Q-Former's scores (training films of both
hospitals). Its logit is mixed with the Q-Former's own score, as far as validation films at home lose nothing by it. The
mix is calibrated (Platt scaling) on films that the regression has not seen: IU X-RAY's validation films, and the NIH's,
read by regressions that were fitted without them (five folds by patient). Figures come from these films as well; the
calibration is cross-fitted over the same folds for its own. No film of a test split is used.

A processor's arithmetic rounds features, and a copy of a film that differs in its last bit is rounded otherwise. The
regression is penalized for what such differences change (``FilmFeatures.differences``), so that equal films score
alike, whatever the variant.

The NIH's training films are normal or labelled pneumonia, and most of the normal ones are AP. So that the regression
does not learn the view or the hospital instead, both are covariates of the fit, which the reader leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from cbedge.findings.finding_reader import FindingReader
from cbedge.findings.image_findings import MIN_AUC, ImageFindings, Measured, Standing
from export.finding_features import IU_XRAY, NIH, FilmFeatures
from training.encoder.labels import FINDINGS
from training.external import BINS, auc_with_interval, calibration_error
from training.ontology import ONTOLOGY
from training.openings import with_denials

FOLDS = 5
STRENGTH = 0.1  # L2 penalty of the regression; chosen by the mean AUC of both hospitals
ROUNDING = 10.0  # penalty of the mean squared change of a logit by another arithmetic; costs no AUC
AWAY_WEIGHT = 0.3  # of all NIH films in the regression; IU X-RAY's have 1
CALIBRATION_AWAY = 0.25  # of all NIH films in the calibration; IU X-RAY's have 1
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the regression in the mix with the Q-Former's score
MAX_LOSS = 0.005  # of AUC at home, by the mix
NUISANCE = 100.0  # scale of the covariates that the reader leaves out; the penalty hardly holds them
SMOOTHING = 0.05  # of the NIH's labels, which rules mined from reports
PRIOR = 10.0  # weight of the calibration's prior, in films
MIN_POSITIVES = 5  # films with a finding, for a figure
MIN_HOME = 10  # positives at home, for a balanced threshold of home's films alone
SENSITIVITY, SPECIFICITY = 0.90, 0.95


@dataclass(frozen=True)
class Fitted:
    """The outcome of :func:`fit_findings`.

    Attributes:
        reader: for the bundle.
        findings: for the manifest.
        record: figures of each finding at home and away, JSON-ready.
    """

    reader: FindingReader
    findings: ImageFindings
    record: dict[str, Any]


@dataclass(frozen=True)
class _ViewFit:
    """Readers of one view, and what they say of films that they have not seen.

    Attributes:
        weights: [T, 1 + D + Q], bias first, for pooled features and the Q-Former's scores.
        raw: logits before calibration of films that the regression has not seen, float [N, T]; NaN for others.
        unseen: the same, calibrated by films of other folds.
    """

    weights: np.ndarray
    raw: np.ndarray
    unseen: np.ndarray


def fit_findings(films: FilmFeatures, findings: ImageFindings, strength: float = STRENGTH) -> Fitted:
    """Fit readers of the bundle's findings and of the ontology's others.

    A finding that the Q-Former does not score is added if the NIH labels it, or if its AUC at home is good.

    Args:
        films: of IU X-RAY, and of the NIH if it is there.
        findings: the bundle's findings; those of the Q-Former's head stay first.
        strength: L2 penalty of the regression.

    Raises:
        ValueError: there are no validation films of IU X-RAY.
    """
    if not len(films.where(IU_XRAY, "frontal", "val")):
        raise ValueError("no frontal validation film of IU X-RAY to calibrate the readers of findings with")
    head = findings.head
    names = (*head.names, *(name for name in FINDINGS if name not in head.names))
    labels = films.labels[:, [FINDINGS.index(name) for name in names]]
    frontal, lateral = (_fit_view(films, labels, view, strength) for view in ("frontal", "lateral"))
    pairs, paired = _fit_pairs(films, labels, frontal, lateral)
    places = {place: _measure(films, names, labels, frontal, place) for place in (IU_XRAY, NIH)}
    good = {name for name, row in places[IU_XRAY].items() if row["auc"][1] >= MIN_AUC}
    fitted = {name for i, name in enumerate(names) if frontal.weights[i].any()}
    labelled = {name for name, finding in ONTOLOGY.items() if finding.nih}
    kept = [i for i, name in enumerate(names) if name in {*head.names, *(labelled & fitted), *good}]
    points = _operating_points(films, labels, frontal.unseen, pairs)
    blank = ("",) * (len(kept) - len(head.names))
    chosen = ImageFindings(
        names=tuple(names[i] for i in kept),
        thresholds=tuple(points["balanced"][i] for i in kept),
        openings=(*(head.openings or ("",) * len(head.names)), *blank),
        lateral_shares=(*(head.lateral_shares or (0.5,) * len(head.names)), *(0.5 for _ in blank)),
        standings=tuple(_standing(places, names[i]) for i in kept),
        operating_points={point: tuple(values[i] for i in kept) for point, values in points.items()},
        head_thresholds=head.thresholds,
    )
    rows = np.stack([frontal.weights, lateral.weights, *paired])[:, kept]
    record = _record(films, chosen, places, strength)
    return Fitted(FindingReader(rows.astype(np.float32)), with_denials(chosen), record)


def _fit_view(films: FilmFeatures, labels: np.ndarray, view: str, strength: float) -> _ViewFit:
    home, away = films.where(IU_XRAY, view, "val"), films.where(NIH, view)
    train = np.concatenate([films.where(IU_XRAY, view, "train"), away])
    features = np.concatenate([films.pooled, films.logits], 1).astype(np.float32)
    mean, scale = features[train].mean(0), features[train].std(0) + 1e-6
    nuisance = np.stack([films.collection == NIH, films.position == "AP"], 1) * NUISANCE
    features, width = np.concatenate([(features - mean) / scale, nuisance], 1).astype(np.float32), len(mean)
    smooth = np.where(films.collection == NIH, SMOOTHING, 0.0)[:, None]
    targets = np.where(labels == 1, 1 - smooth, smooth)
    folds, scores = _folds(films.group), films.logits.shape[1]
    changes = np.zeros((0, features.shape[1]), np.float32)
    if len(films.coarse):
        changes = films.differences[films.view[films.coarse] == view] / scale
        changes = np.pad(changes, ((0, 0), (0, features.shape[1] - width))) * np.sqrt(ROUNDING / max(1, len(changes)))
    raw, unseen = np.full((2, *labels.shape), np.nan)
    weights = np.zeros((labels.shape[1], 1 + width))

    def fit(rows: np.ndarray, column: int) -> np.ndarray:
        """Bias and weights, [1 + width]."""
        importance = _balanced(films.collection[rows], AWAY_WEIGHT)
        importance = importance / importance.sum()
        return _logistic(features[rows], targets[rows, column], importance, strength, changes=changes)[: 1 + width]

    for column in range(labels.shape[1]):
        known = train[labels[train, column] >= 0]
        if (labels[known, column] == 1).sum() < MIN_POSITIVES:
            continue
        whole = fit(known, column)
        first = np.full(len(films), np.nan)
        first[home] = whole[0] + features[home, :width] @ whole[1:]
        is_away = films.collection[known] == NIH
        for fold in range(FOLDS) if is_away.any() else ():
            held = away[folds[away] == fold]
            part = fit(known[~(is_away & (folds[known] == fold))], column)
            first[held] = part[0] + features[held, :width] @ part[1:]
        own = films.logits[:, column] if column < scores else np.zeros(len(films))
        share = _share(first[home], own[home], labels[home, column]) if column < scores else 1.0
        rows = np.concatenate([home, away]) if is_away.any() else home
        rows = rows[labels[rows, column] >= 0]
        raw[:, column] = share * first + (1 - share) * own
        platt, unseen[:, column] = _cross_fit(
            raw[:, [column]], labels[:, column], films.collection, folds, rows, (1.0,)
        )
        slopes = share * whole[1:] / scale
        bias = share * whole[0] - slopes @ mean
        if column < scores:
            slopes[len(slopes) - scores + column] += 1 - share
        weights[column] = [platt[0] + platt[1] * bias, *(platt[1] * slopes)]
    return _ViewFit(weights, raw, unseen)


def _share(read: np.ndarray, own: np.ndarray, labels: np.ndarray) -> float:
    """The largest share of the regression with which the AUC of films at home is not below that of the Q-Former."""
    known = labels >= 0
    truth = labels[known] == 1
    if min(truth.sum(), (~truth).sum()) < MIN_POSITIVES:
        return 0.5
    areas = {share: roc_auc_score(truth, (share * read + (1 - share) * own)[known]) for share in SHARES}
    return max(share for share, area in areas.items() if area >= areas[0.0] - MAX_LOSS)


def _fit_pairs(
    films: FilmFeatures, labels: np.ndarray, frontal: _ViewFit, lateral: _ViewFit
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cross-fitted logits of IU X-RAY's validation studies, [N, T] at their frontal film, and the readers of pairs."""
    second = {films.group[i]: i for i in films.where(IU_XRAY, "lateral", "val")[::-1]}
    rows = np.array([i for i in films.where(IU_XRAY, "frontal", "val") if films.group[i] in second], int)
    logits, readers = frontal.unseen.copy(), (frontal.weights.copy(), lateral.weights.copy())
    folds = _folds(films.group)
    for column in range(labels.shape[1]):
        inputs = np.full((len(films), 2), np.nan)
        inputs[rows, 0] = frontal.unseen[rows, column]
        inputs[rows, 1] = lateral.unseen[[second[films.group[i]] for i in rows], column]
        known = rows[(labels[rows, column] >= 0) & np.isfinite(inputs[rows]).all(1)]
        joined, unseen = np.array([0.0, 1.0, 0.0]), np.full(len(films), np.nan)
        if len(known):
            joined, unseen = _cross_fit(inputs, labels[:, column], films.collection, folds, known, (0.5, 0.5))
        logits[known, column] = unseen[known]
        for reader, weight in zip(readers, joined[1:], strict=True):
            reader[column] *= weight
        readers[0][column, 0] += joined[0]
    return logits, readers


def _cross_fit(
    inputs: np.ndarray,
    labels: np.ndarray,
    collection: np.ndarray,
    folds: np.ndarray,
    rows: np.ndarray,
    prior: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """A calibrated regression of a few logits: bias and weights fitted to all rows, and cross-fitted logits [N]."""

    def fit(some: np.ndarray) -> np.ndarray:
        return _logistic(inputs[some], labels[some] == 1, _balanced(collection[some], CALIBRATION_AWAY), PRIOR, prior)

    unseen = np.full(len(labels), np.nan)
    for fold in range(FOLDS):
        held = rows[folds[rows] == fold]
        part = fit(rows[folds[rows] != fold])
        unseen[held] = part[0] + inputs[held] @ part[1:]
    return fit(rows), unseen


def _logistic(
    rows: np.ndarray,
    targets: np.ndarray,
    importance: np.ndarray,
    strength: float,
    prior: Sequence[float] = (0.0,),
    changes: np.ndarray | None = None,
) -> np.ndarray:
    """Logistic regression with L2 penalties on the distance from a prior and on the logits of ``changes``, [M, D]:
    bias and weights, [1 + D]."""
    centre = np.broadcast_to(np.array(prior), rows.shape[1:])
    unwanted = np.zeros((0, rows.shape[1]), rows.dtype) if changes is None else changes.astype(rows.dtype)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        weights = values[1:].astype(rows.dtype)
        logits, changed = rows @ weights + values[0], unwanted @ weights
        away = values[1:] - centre
        error = importance * (expit(logits) - targets)
        total = importance @ (np.logaddexp(0, logits) - targets * logits) + strength / 2 * away @ away
        slope = error.astype(rows.dtype) @ rows + strength * away + changed @ unwanted
        return float(total + changed @ changed / 2), np.concatenate([[error.sum()], slope])

    rate = np.clip(importance @ targets / importance.sum(), 1e-3, 1 - 1e-3)
    start = np.concatenate([[np.log(rate / (1 - rate))], centre])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def _balanced(collection: np.ndarray, away: float = 1.0) -> np.ndarray:
    """A weight for each film, such that the NIH's together weigh ``away`` times the others; 1 on average."""
    is_away = collection == NIH
    weight = np.where(is_away, away / max(1, is_away.sum()), 1 / max(1, (~is_away).sum()))
    return weight * len(weight) / max(weight.sum(), 1e-12)


def _folds(groups: np.ndarray) -> np.ndarray:
    """A fold for each film, by a hash of its study or patient."""
    return np.array([int(hashlib.sha256(f"fold {group}".encode()).hexdigest(), 16) % FOLDS for group in groups])


def _operating_points(
    films: FilmFeatures, labels: np.ndarray, frontal: np.ndarray, pairs: np.ndarray
) -> dict[str, tuple[float, ...]]:
    """Thresholds of the three operating points, on films that no reader has seen.

    ``balanced``: for "abnormal", the best balanced accuracy on IU X-RAY's validation studies; another finding is
    reported as often there as it occurs, or, with fewer than :data:`MIN_HOME` studies with it, on the films of both
    hospitals. ``sensitive`` finds :data:`SENSITIVITY` of the films with a finding, ``specific`` leaves
    :data:`SPECIFICITY` of those without it alone, with both hospitals weighing the same.
    """
    home, away = films.where(IU_XRAY, "frontal", "val"), films.where(NIH, "frontal")
    points: dict[str, list[float]] = {"sensitive": [], "balanced": [], "specific": []}
    for column in range(labels.shape[1]):
        known = labels[:, column] >= 0
        at_home = home[known[home] & np.isfinite(pairs[home, column])]
        both = np.concatenate([at_home, away[known[away] & np.isfinite(frontal[away, column])]])
        rows = at_home if (labels[at_home, column] == 1).sum() >= MIN_HOME else both
        chances = expit(np.where(np.isin(both, home), pairs[both, column], frontal[both, column]))
        truth, importance = labels[both, column] == 1, _balanced(films.collection[both])
        inside = np.isin(both, rows)
        if not truth[inside].any():
            balanced = 0.5
        elif column == 0:
            balanced = _best_balanced(chances[inside], truth[inside])
        else:
            balanced = float(np.quantile(chances[inside], 1 - min(truth[inside].mean(), 0.5)))
        sensitive = _quantile(chances[truth], importance[truth], 1 - SENSITIVITY)
        specific = _quantile(chances[~truth], importance[~truth], SPECIFICITY)
        points["sensitive"].append(min(sensitive, balanced))
        points["balanced"].append(balanced)
        points["specific"].append(max(specific, balanced))
    return {point: tuple(values) for point, values in points.items()}


def _best_balanced(chances: np.ndarray, truth: np.ndarray) -> float:
    candidates = np.quantile(chances, np.linspace(0.02, 0.98, 97))
    right = [((chances[truth] >= c).mean() + (chances[~truth] < c).mean()) / 2 for c in candidates]
    return float(candidates[int(np.argmax(right))])


def _quantile(values: np.ndarray, importance: np.ndarray, share: float) -> float:
    """The weighted quantile of values; 0.5 if there are none."""
    if not len(values):
        return 0.5
    order = np.argsort(values)
    reached = np.cumsum(importance[order]) / importance.sum()
    return float(values[order[min(int(np.searchsorted(reached, share)), len(values) - 1)]])


def _measure(
    films: FilmFeatures, names: Sequence[str], labels: np.ndarray, fitted: _ViewFit, place: str
) -> dict[str, dict[str, Any]]:
    """Figures of each finding with enough films in one place; frontal films that no reader has seen.

    AUC compares AP films with AP films and PA with PA: where one view holds the sicker patients, the view would count
    as the finding. A finding whose labels are those of "abnormal" there is not measured: it is not told from others.
    """
    rows = films.where(place, "frontal", "val" if place == IU_XRAY else None)
    found: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        known = rows[(labels[rows, column] >= 0) & np.isfinite(fitted.unseen[rows, column])]
        truth, chances = labels[known, column] == 1, expit(fitted.unseen[known, column])
        coincides = column > 0 and np.array_equal(labels[known, column], labels[known, 0])
        if min(truth.sum(), (~truth).sum()) < MIN_POSITIVES or coincides:
            continue
        measured = partial(auc_with_interval, truth, groups=films.group[known], strata=films.position[known])
        head = films.logits[known, column] if column < films.logits.shape[1] else None
        found[name] = {
            "auc": measured(scores=fitted.raw[known, column]),
            "head_auc": None if head is None else measured(scores=head)[0],
            "films": len(known),
            "positives": int(truth.sum()),
            "mean_probability": float(chances.mean()),
            "calibration_error": calibration_error(truth, chances),
            "reliability": _reliability(truth, chances),
        }
    return found


def _reliability(truth: np.ndarray, chances: np.ndarray) -> list[list[float]]:
    """For each bin with films: mean probability, share of films with the finding, number of films."""
    bins = np.minimum((chances * BINS).astype(int), BINS - 1)
    inside = [bins == one for one in np.unique(bins)]
    return [[float(chances[b].mean()), float(truth[b].mean()), int(b.sum())] for b in inside]


def _standing(places: dict[str, dict[str, dict[str, Any]]], name: str) -> Standing:
    measured = {}
    for place, rows in places.items():
        if name in rows:
            auc, low, high = rows[name]["auc"]
            measured[place] = Measured(auc, low, high, rows[name]["films"], rows[name]["positives"])
    return Standing(measured.get(IU_XRAY), measured.get(NIH))


def _record(
    films: FilmFeatures, findings: ImageFindings, places: dict[str, dict[str, dict[str, Any]]], strength: float
) -> dict[str, Any]:
    counts = {place: {view: len(films.where(place, view)) for view in ("frontal", "lateral")} for place in places}
    return {
        "films": counts,
        "strength": strength,
        "home": {name: places[IU_XRAY].get(name) for name in findings.names},
        "away": {name: places[NIH].get(name) for name in findings.names},
        "operating_points": {
            point: dict(zip(findings.names, values, strict=True)) for point, values in findings.operating_points.items()
        },
    }
