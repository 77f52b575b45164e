"""Evaluate a bundle on labelled films of another hospital: what its users see of films from elsewhere.

NIH ChestX-ray14 (Wang et al., CVPR 2017) has labels that rules mined from reports, right in more than 90% according to
its authors. An image can show what its label does not say, so scores are judged by AUC rather than by F1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbedge.api import ReportGenerator
from cbedge.errors import DraftError
from cbedge.findings.image_findings import AnyPattern
from cbedge.images.gate import NotAChestRadiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.report import MARK
from cbedge.sentences import split_text
from training.encoder.films import VALIDATION_SHARE, patient_share
from training.encoder.labels import COMPARED, FINDINGS, nih_labels
from training.findings import Mention, find_mentions
from training.ontology import ONTOLOGY
from training.records import origin, table

COLLECTIONS = ("nih_cxr14",)
BINS = 15
MIN_FILMS = 5  # with and without a finding, for its figures
# CheXNet (DenseNet-121 trained on 86,000 films of the NIH) on 621 films, of which the split "test" is half.
CHEXNET = {
    "abnormal": 0.790,
    "cardiomegaly": 0.920,
    "effusion": 0.859,
    "atelectasis": 0.738,
    "opacity": 0.696,
    "hyperinflation": 0.850,
    "congestion": 0.906,
    "scar": 0.719,
}


@dataclass(frozen=True)
class LabelledFilm:
    """One film: its file, a patient's identifier, and labels, int8 [FINDINGS], 1, 0 or -1 (unknown)."""

    file: Path
    patient: str
    labels: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a user gets for one film.

    Attributes:
        accepted: whether the gate takes it for a chest radiograph.
        scores: score of each of the model's findings, 0 to 1.
        text: the draft, written also of a refused film; empty if there is none.
        unmarked: its sentences that have no mark, which says that what they state or deny is not assessed.
    """

    film: LabelledFilm
    accepted: bool
    scores: dict[str, float]
    text: str
    unmarked: tuple[str, ...] = ()


def read_films(collection: str, folder: Path, split: str = "test") -> list[LabelledFilm]:
    """The films of a split of ``nih_cxr14``: ``test``, or ``val``, which are 15% of its training patients.

    Raises:
        ValueError: the collection or the split is unknown.
        FileNotFoundError: the folder has no ``films.jsonl``.
    """
    if collection not in COLLECTIONS:
        raise ValueError(f"unknown external collection {collection[:40]!r}; known: {', '.join(COLLECTIONS)}")
    if split not in ("test", "val"):
        raise ValueError(f"unknown split {split[:40]!r}; known: test, val")
    films = []
    for line in (folder / "films.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == ("test" if split == "test" else "train") and (
            split == "test" or patient_share(row["patient"]) < VALIDATION_SHARE
        ):
            films.append(LabelledFilm(folder / "images" / row["file"], row["patient"], nih_labels(row["labels"])))
    return films


def parse_external(option: str) -> tuple[str, Path]:
    """Split ``nih_cxr14=FOLDER``.

    Raises:
        ValueError: it has another form.
    """
    name, separator, folder = option.partition("=")
    if not separator or not folder:
        raise ValueError(f"--external is {option[:60]!r}: give COLLECTION=FOLDER, such as nih_cxr14=data/nih")
    return name, Path(folder)


def evaluate_films(
    generator: ReportGenerator, films: Sequence[LabelledFilm], progress: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Draft films (:func:`draft_films`) and measure (:func:`external_record`)."""
    findings = generator.bundle.manifest.image_findings
    if findings is None:
        raise ValueError(f"{generator.bundle.manifest.name} has no image findings to evaluate")
    points = findings.operating_points or {"default": findings.thresholds}
    thresholds = {point: dict(zip(findings.names, values, strict=True)) for point, values in points.items()}
    return external_record(draft_films(generator, films, progress), thresholds)


def draft_films(
    generator: ReportGenerator, films: Sequence[LabelledFilm], progress: Callable[[int], None] = lambda count: None
) -> list[Outcome]:
    """Draft every film, without an indication, also those that the gate refuses.

    Args:
        generator: a bundle with image findings.
        films: from :func:`read_films`.
        progress: called with 1 after each film.
    """
    outcomes = []
    for film in films:
        radiograph, accepted, text = load_radiograph(film.file), True, ""
        unmarked: tuple[str, ...] = ()
        try:
            try:
                report = generator.generate(radiograph)
            except NotAChestRadiograph:
                accepted = False
                report = generator.generate(radiograph, accept_any_image=True)
            text, scores = report.text.replace(MARK, ""), dict(report.finding_scores or {})
            unmarked = tuple(one.text for one in report.sentences if not one.marked)
        except DraftError:
            scores = {}
        outcomes.append(Outcome(film, accepted, scores, text, unmarked))
        progress(1)
    return outcomes


def external_record(
    outcomes: Sequence[Outcome], operating_points: dict[str, dict[str, float]], seed: int = 0
) -> dict[str, Any]:
    """A JSON-ready record: the gate's rate, figures of each finding, and denials of what is labelled.

    Each finding with at least :data:`MIN_FILMS` films with it and without it has its AUC with a 95% interval (bootstrap
    over patients), sensitivity and specificity at each operating point, and the expected calibration error of its score
    (:data:`BINS` bins of equal width; Guo et al., ICML 2017). A label is denied if the draft names it only to deny it.

    Args:
        outcomes: of :func:`draft_films`.
        operating_points: name → threshold of each of the model's findings.
        seed: of the bootstrap.
    """
    labels = np.stack([outcome.film.labels for outcome in outcomes])
    patients = np.array([outcome.film.patient for outcome in outcomes])
    scored = np.array([bool(outcome.scores) for outcome in outcomes])
    findings: dict[str, dict[str, Any]] = {}
    first = next(iter(operating_points.values()))
    for column, name in enumerate(FINDINGS):
        known = (labels[:, column] >= 0) & scored
        truth = labels[:, column] == 1
        if name not in first or min(truth[known].sum(), (~truth[known]).sum()) < MIN_FILMS:
            continue
        scores = np.array([outcome.scores.get(name, 0.0) for outcome in outcomes])
        findings[name] = {
            "films": int(known.sum()),
            "positives": int(truth[known].sum()),
            "auc": auc_with_interval(truth[known], scores[known], patients[known], seed),
            "operating_points": {
                point: {
                    "threshold": thresholds[name],
                    "sensitivity": float((scores[known & truth] >= thresholds[name]).mean()),
                    "specificity": float((scores[known & ~truth] < thresholds[name]).mean()),
                }
                for point, thresholds in operating_points.items()
            },
            "calibration_error": calibration_error(truth[known], scores[known]),
            "chexnet_auc": CHEXNET.get(name),
        }
    compared = [name for name in COMPARED if name in findings]
    aucs = [findings[name]["auc"][0] for name in compared]
    return {
        "films": len(outcomes),
        "patients": len({*patients.tolist()}),
        "without_draft": int((~scored).sum()),
        "accepted": sum(outcome.accepted for outcome in outcomes),
        "findings": findings,
        "mean_auc": {"findings": compared, "value": float(np.mean(aucs)) if aucs else None},
        "mean_calibration_error": float(np.mean([row["calibration_error"] for row in findings.values()] or [np.nan])),
        "denied": _denied(outcomes, labels),
    }


def calibration_error(truth: np.ndarray, scores: np.ndarray) -> float:
    """Expected calibration error: the mean distance of score and share of positives over bins, weighted by films."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    return sum(
        float((bins == one).mean() * abs(truth[bins == one].mean() - scores[bins == one].mean()))
        for one in np.unique(bins)
    )


def auc_with_interval(
    truth: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
    strata: np.ndarray | None = None,
) -> list[float]:
    """AUC and its 95% interval, by bootstrap over groups.

    Args:
        truth: bool [N], with both values.
        scores: float [N].
        groups: the patient or study of each film, [N].
        seed: of the bootstrap.
        resamples: number of bootstrap samples.
        strata: [N]; only films of the same stratum are compared, such as AP films with AP films.
    """
    _, member = np.unique(groups, return_inverse=True)
    kinds = np.zeros(len(truth)) if strata is None else strata
    orders = [rows[np.argsort(scores[rows])] for rows in (np.flatnonzero(kinds == kind) for kind in np.unique(kinds))]

    def area(weights: np.ndarray) -> float:
        wins, pairs = 0.0, 0.0
        for order in orders:
            above, below = weights[order] * truth[order], weights[order] * ~truth[order]
            _, tied = np.unique(scores[order], return_inverse=True)
            equal = np.bincount(tied, below)
            wins += above @ (np.cumsum(equal) - equal / 2)[tied]
            pairs += above.sum() * below.sum()
        return wins / pairs if pairs else math.nan

    count, rng = member.max() + 1, np.random.default_rng(seed)
    samples = [area(np.bincount(rng.integers(count, size=count), minlength=count)[member]) for _ in range(resamples)]
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return [area(np.ones(len(truth))), float(low), float(high)]


def _denied(outcomes: Sequence[Outcome], labels: np.ndarray) -> dict[str, dict[str, int]]:
    """For each finding: films labelled with it; drafts of those that name it only to deny it, and those of them with an
    unmarked sentence that does; drafts with a sentence that the ontology's patterns call contradicting, and with an
    unmarked one."""
    whole = [*find_mentions(outcome.text for outcome in outcomes)]
    unmarked = [*find_mentions(" ".join(outcome.unmarked) for outcome in outcomes)]
    denied = {}
    for column, name in enumerate(FINDINGS):
        rows = np.flatnonzero(labels[:, column] == 1).tolist()
        if not rows or not ONTOLOGY[name].read_as:
            continue

        def said(mentions: list[list[Mention]], row: int, name: str = name) -> list[bool]:
            return [mention.denied for mention in mentions[row] if mention.finding in ONTOLOGY[name].read_as]

        contradicts = AnyPattern(ONTOLOGY[name].denials).search
        by_name = [row for row in rows if said(whole, row) and all(said(whole, row))]
        denied[name] = {
            "films": len(rows),
            "denied": len(by_name),
            "denied_unmarked": sum(bool(said(unmarked, row)) for row in by_name),
            "contradicted": sum(any(map(contradicts, split_text(outcomes[row].text))) for row in rows),
            "contradicted_unmarked": sum(any(map(contradicts, outcomes[row].unmarked)) for row in rows),
        }
    return denied


def document(record: dict[str, Any]) -> str:
    """A record of films of other hospitals alone as Markdown."""
    tables = [line for name, films in record["external"].items() for line in ("", *to_markdown(name, films))]
    return (
        "\n".join(["# Films of other hospitals", "", f"{origin(record)}. Variant {record['variant']}.", *tables]) + "\n"
    )


def to_markdown(name: str, record: dict[str, Any]) -> list[str]:
    """The record as tables, CheXNet's figures beside."""
    films, mean = record["films"], record["mean_auc"]
    rows = [
        (
            finding,
            f"{row['auc'][0]:.3f} ({row['auc'][1]:.3f} to {row['auc'][2]:.3f})",
            f"{row['chexnet_auc']:.3f}" if row["chexnet_auc"] else "",
            *(f"{one['sensitivity']:.2f} / {one['specificity']:.2f}" for one in row["operating_points"].values()),
            f"{row['calibration_error']:.2f}",
            f"{row['positives']} of {row['films']}",
        )
        for finding, row in record["findings"].items()
    ]
    points: list[str] = next(([*row["operating_points"]] for row in record["findings"].values()), [])
    header = ("", "AUC (95% interval)", "CheXNet's", *points, "calibration error", "films")
    denied = [(finding, *row.values()) for finding, row in record["denied"].items()]
    return [
        f"## {name}: {films} films of {record['patients']} patients",
        "",
        f"The gate accepts {record['accepted']} of {films} films. Mean AUC of {len(mean['findings'])} findings "
        f"({', '.join(mean['findings'])}): {mean['value'] or 0:.3f}; mean calibration error of all findings: "
        f"{record['mean_calibration_error']:.3f}. CheXNet's figures are of 621 films of that hospital, which include "
        "the test split. Sensitivity / specificity is that of the score alone at each operating point; in a draft, a "
        "finding also needs an abnormal score.",
        "",
        *table(header, rows),
        "",
        'Denied: named only to be denied. Contradicted: a sentence matches the ontology\'s patterns ("normal heart"). '
        "Unmarked: by a sentence without the mark of what is not assessed.",
        "",
        *table(("labelled", "films", "denied", "unmarked", "contradicted", "unmarked"), denied),
        "",
    ]
