"""Linear probes: how well each finding can be predicted from pixels, vision encoder and Q-Former."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext
from training.datasets import Study
from training.drafting import Encoder
from training.ontology import TAGS

KINDS = {"pixels": "raw pixels, 32 x 32", "vision": "vision encoder", "qformer": "Q-Former output"}
_SIDE = 32
_COMPONENTS = 256
_LEAST_POSITIVES = 5
_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

Representation = dict[str, np.ndarray]


def represent(
    encoder: Encoder,
    studies: Sequence[Study],
    advance: Callable[[int], None] = lambda count: None,
    kinds: Sequence[str] = tuple(KINDS),
) -> Representation:
    """Representations of every study's image, each float32 [studies, D].

    Args:
        advance: called with the number of encoded studies.
        kinds: ``pixels``: the downscaled radiograph; ``vision``: class token and mean of patches; ``qformer``: the
            output of all queries.
    """
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for start in range(0, len(studies), encoder.batch_size):
        images = [load_radiograph(s.image) for s in studies[start : start + encoder.batch_size]]
        features = encoder.encode(images)
        patches = features[:, 1:].mean(1)
        found = {
            "pixels": np.stack([_small(image.pixels) for image in images]),
            "vision": np.concatenate([features[:, 0].cpu().numpy(), patches.cpu().numpy()], axis=1),
        }
        if "qformer" in rows:
            queries = encoder.query(features, [ClinicalContext(view="frontal")] * len(images))
            found["qformer"] = queries.flatten(1).cpu().numpy()
        for kind, parts in rows.items():
            parts.append(found[kind])
        advance(len(images))
    return {kind: np.concatenate(parts).astype(np.float32) for kind, parts in rows.items()}


def probe(
    seen: Mapping[str, Representation],
    studies: Mapping[str, Sequence[Study]],
    kinds: Sequence[str] = tuple(KINDS),
) -> dict[str, dict[str, float]]:
    """AUC of each tag: logistic regression on 256 principal components, fitted to ``train``, with the regularization
    chosen on ``val``.

    Args:
        seen: :func:`represent` of the splits ``train``, ``val`` and ``studied``.

    Returns:
        For tags with five positives in every split: AUC of each kind on ``studied``, and number of ``positives`` there.
    """
    labels = {name: np.array([s.tags for s in group]) for name, group in studies.items()}
    reduced = {kind: _reduce({name: seen[name][kind] for name in seen}) for kind in kinds}
    found: dict[str, dict[str, float]] = {}
    for column, tag in enumerate(TAGS):
        known = {name: values[:, column] >= 0 for name, values in labels.items()}
        columns = {name: values[known[name], column] for name, values in labels.items()}
        if all(_LEAST_POSITIVES <= c.sum() < len(c) for c in columns.values()):
            found[tag] = {
                kind: _auc({name: x[known[name]] for name, x in by_split.items()}, columns)
                for kind, by_split in reduced.items()
            }
            found[tag]["positives"] = int(columns["studied"].sum())
    return found


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32).ravel()


def _reduce(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Standardize and project on the principal components of ``train``; a linear probe is then fast."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = inputs["train"]
    count = min(_COMPONENTS, *train.shape)
    steps = make_pipeline(StandardScaler(), PCA(count, svd_solver="randomized", random_state=0), StandardScaler())
    steps.fit(train)
    return {name: steps.transform(values) for name, values in inputs.items()}


def _auc(inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    best = (-1.0, 0.5)
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=500).fit(inputs["train"], labels["train"])
        areas = [float(roc_auc_score(labels[n], model.decision_function(inputs[n]))) for n in ("val", "studied")]
        best = max(best, (areas[0], areas[1]))
    return best[1]
