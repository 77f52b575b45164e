"""Measure whether more studies would help: linear probes of a frozen image encoder, fitted to parts of the train split.

The encoder must not be trained on these studies: only then do the features not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from training.datasets import Study
from training.datasets.iu_xray import read_studies
from training.drafting import Encoder
from training.probes import KINDS, Representation, probe, represent
from training.records import origin, table

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
_SHOWN = ("abnormal", "cardiomegaly", "effusion", "mean")


def learning_curve(
    seen: Mapping[str, Representation],
    studies: Mapping[str, Sequence[Study]],
    kinds: Sequence[str] = ("vision",),
    repeats: int = 5,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """AUC of :func:`training.probes.probe` for different numbers of training studies.

    Args:
        seen, studies: as :func:`training.probes.probe` takes them: splits ``train``, ``val`` and ``studied``.
        repeats: random samples of each fraction of the train split; one for the whole split.
        advance: called after each sample with 1.

    Returns:
        For each of :data:`FRACTIONS`, the number of ``studies``; and for each kind and tag (and ``mean``, over the tags
        that every sample allows) the mean AUC of the samples and its standard deviation.

    Raises:
        ValueError: no tag has enough positives in every sample.
    """
    rng = np.random.default_rng(0)
    whole = len(studies["train"])
    drawn: list[tuple[int, list[dict[str, dict[str, float]]]]] = []
    for fraction in FRACTIONS:
        count, found = round(whole * fraction), []
        for _ in range(repeats if fraction < 1 else 1):
            rows = np.sort(rng.permutation(whole)[:count])
            part = {kind: values[rows] for kind, values in seen["train"].items()}
            few = [studies["train"][i] for i in rows]
            found.append(probe({**seen, "train": part}, {**studies, "train": few}, kinds=kinds))
            advance(1)
        drawn.append((count, found))
    known = set.intersection(*(set(tags) for _, found in drawn for tags in found))
    if not known:
        raise ValueError(f"{whole} train studies are too few: no tag has enough positives in every sample")
    points = []
    for count, found in drawn:
        point: dict[str, Any] = {"studies": count}
        for kind in kinds:
            areas = {tag: np.array([tags[tag][kind] for tags in found]) for tag in sorted(known)}
            areas["mean"] = np.mean([*areas.values()], axis=0)
            point[kind] = {tag: [float(a.mean()), float(a.std())] for tag, a in areas.items()}
        points.append(point)
    return points


def measure(
    encoder: Encoder,
    data: Path,
    split: str = "test",
    repeats: int = 5,
    limit: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The learning curve of an image encoder and of raw pixels on IU X-RAY, as a JSON-ready record.

    Args:
        encoder: a model that was not trained on these studies.
        split: split for the AUC, ``test`` or ``val``; the regularization is chosen on ``val``.
        repeats: see :func:`learning_curve`.
        limit: maximum number of studies per split, for a trial; the record says so.

    Raises:
        ValueError: no tag has enough positives in every sample of the train split.
    """
    splits = {"train": "train", "val": "val", "studied": split}
    groups = {name: [s for s in read_studies(data, (of,)) if s.findings][:limit] for name, of in splits.items()}
    kinds = ("vision", "pixels")
    seen = {}
    with Progress(console=console or Console(stderr=True)) as progress:
        for name, group in groups.items():
            task = progress.add_task(f"encoding {name} radiographs", total=len(group))
            seen[name] = represent(encoder, group, partial(progress.advance, task), kinds)
        task = progress.add_task("probing", total=repeats * (len(FRACTIONS) - 1) + 1)
        points = learning_curve(seen, groups, kinds, repeats, advance=partial(progress.advance, task))
    return {
        "split": split,
        "studies": len(groups["studied"]),
        "limited": limit is not None,
        "repeats": repeats,
        "kinds": [*kinds],
        "points": points,
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The curve as a table: mean AUC of the samples with its standard deviation."""
    points = record["points"]
    limited = " (limited: a trial, not the whole splits)" if record["limited"] else ""
    lines = [
        f"# Would more studies help?{limited}",
        "",
        f"{origin(record)}. Linear probes of the frozen base `{record['base']}`, frontal radiographs, fitted to parts "
        f"of the train split ({record['repeats']} samples each), AUC on {record['studies']} {record['split']} studies "
        "± standard deviation of the samples.",
        "",
    ]
    for kind in record["kinds"]:
        tags = list(points[-1][kind])
        rows = []
        for point in points:
            values = (f"{mean:.3f}" + (f" ± {spread:.3f}" if spread else "") for mean, spread in point[kind].values())
            rows.append((point["studies"], *values))
        lines += [f"## {KINDS[kind]}", "", *table(("train studies", *tags), rows)]
        lines.append("")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the curve of the first kind: AUC against train studies, on a logarithmic axis."""
    from matplotlib.figure import Figure

    kind, points = record["kinds"][0], record["points"]
    counts = [point["studies"] for point in points]
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for tag in [tag for tag in _SHOWN if tag in points[-1][kind]]:
        means, spreads = (np.array([point[kind][tag][i] for point in points]) for i in (0, 1))
        axes.errorbar(counts, means, spreads, marker="o", capsize=3, label=f"{tag} of all" if tag == "mean" else tag)
    axes.set(xscale="log", xlabel="train studies", ylabel="AUC", title=f"linear probe of the {KINDS[kind]}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
