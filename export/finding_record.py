"""The figures of readers of findings as tables and as reliability curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.external import BINS
from training.records import origin, table

PLACES = {"home": "IU X-RAY, validation films", "away": "NIH, training films, cross-fitted"}


def to_markdown(record: dict[str, Any]) -> str:
    """The record as tables: figures at home and away, thresholds, and the reliability curve of "abnormal"."""
    lines = ["# Readers of findings", "", f"{origin(record)}.", ""]
    for place, title in PLACES.items():
        rows = [
            (
                name,
                "{:.3f} ({:.3f} to {:.3f})".format(*row["auc"]),
                "" if row["head_auc"] is None else f"{row['head_auc']:.3f}",
                f"{row['positives']} of {row['films']}",
                f"{row['mean_probability']:.3f}",
                f"{row['calibration_error']:.3f}",
            )
            for name, row in record[place].items()
            if row is not None
        ]
        if rows:
            errors = [row["calibration_error"] for row in record[place].values() if row]
            header = ("", "AUC (95% interval)", "Q-Former's own", "films", "mean probability", "calibration error")
            lines += [
                f"## {title}",
                "",
                *table(header, rows),
                "",
                f"Mean calibration error: {np.mean(errors):.3f}.",
                "",
            ]
    points = record["operating_points"]
    names = [*next(iter(points.values()))]
    thresholds = [(name, *(f"{values[name]:.3f}" for values in points.values())) for name in names]
    lines += ["## Thresholds", "", *table(("", *points), thresholds), "", "## Reliability of all findings together", ""]
    for place in PLACES:
        curve = [(f"{chance:.2f}", f"{share:.2f}", int(count)) for chance, share, count in reliability(record, place)]
        lines += [*table((f"mean probability, {place}", "share with the finding", "films and findings"), curve), ""]
    return "\n".join(lines)


def reliability(record: dict[str, Any], place: str) -> np.ndarray:
    """The reliability curve of all findings together in one place: mean probability, share with the finding, and number
    of films and findings, for each of 15 bins of equal width that has any; float64 [bins, 3]."""
    sums: dict[int, np.ndarray] = {}
    for row in filter(None, record[place].values()):
        for chance, share, films in row["reliability"]:
            place_of = min(int(chance * BINS), BINS - 1)
            sums[place_of] = sums.get(place_of, np.zeros(3)) + np.array([chance * films, share * films, films])
    curve = np.array([sums[place_of] for place_of in sorted(sums)]).reshape(-1, 3)
    curve[:, :2] /= curve[:, 2:]
    return curve


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the reliability curves of both places; the area of a point grows with its number of films."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="tight")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="grey", linestyle="dotted", label="perfectly calibrated")
    for place, title in PLACES.items():
        chances, shares, counts = reliability(record, place).T
        axes.plot(chances, shares, alpha=0.6)
        axes.scatter(chances, shares, 4 + 40 * np.sqrt(counts / max(counts.max(initial=1), 1)), label=title)
    axes.set(xlabel="probability that the model states", ylabel="share of films with the finding")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
