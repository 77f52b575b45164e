"""Validation of a stage: its losses, the AUC of findings, and their thresholds."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cbedge.findings.image_findings import ImageFindings, scores_of
from training.base import ModelAndTokenizers
from training.batches import Batch, StudyTags, collate, load_pixels, prompted_findings, retarget
from training.config import Stage
from training.consensus import ConsensusReports
from training.datasets import Study
from training.losses import AlignmentHeads, StageLosses
from training.ontology import TAGS
from training.stages import encode_images, query_image

BATCH_SIZE = 16
LATERAL_SHARES = (0.25, 0.75)  # candidates besides equal shares
LEAST_GAIN = 0.005  # of AUC, for unequal shares
LEAST_POSITIVES = 3  # studies with a finding, for an AUC


class Validation:
    """Measures a model on validation studies, with full context and nothing withheld."""

    def __init__(
        self,
        parts: ModelAndTokenizers,
        stage: Stage,
        studies: Sequence[Study],
        device: torch.device,
        autocast: torch.autocast,
        consensus: ConsensusReports | None = None,
    ):
        self.parts, self.stage, self.studies = parts, stage, studies
        self.device, self.autocast = device, autocast
        self.study_tags = StudyTags(stage.tell_from)
        self.consensus = consensus

    @torch.inference_mode()
    def measure(self, losses: StageLosses) -> dict[str, float]:
        """Mean of each loss, and AUC of the tag head for the first tags and on average."""
        self.parts.model.eval()
        totals: dict[str, list[float]] = {}
        for batch in self._batches():
            with self.autocast:
                found = losses(batch, False)
            for name, (value, _) in found.items():
                totals.setdefault(name, []).append(value.item())
        row = {name: float(np.mean(values)) for name, values in totals.items()}
        if self.stage.image_blind:
            return row
        views, tags = self.tag_logits(losses.heads)
        return row | tag_auc(scores_of(np.nanmean(views, 1)), tags)

    @torch.inference_mode()
    def tag_logits(self, heads: AlignmentHeads) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the tag head for frontal and lateral radiograph, [studies, 2, tags], NaN for a missing lateral one;
        and tags (1, 0 or -1), [studies, tags]."""
        self.parts.model.eval()
        logits, tags = [], []
        for batch in self._batches():
            with self.autocast:
                features = encode_images(self.parts.model, batch.images)
                queries, _ = query_image(self.parts.model, features, batch.qformer_ids, batch.qformer_mask)
            rows = heads.tag_logits(queries.float()).cpu().numpy()
            views = np.full((len(batch.tags), 2, rows.shape[1]), np.nan, rows.dtype)
            views[:, 0] = rows[: len(views)]
            views[batch.laterals.cpu().numpy(), 1] = rows[len(views) :]
            logits.append(views)
            tags.append(batch.tags.cpu().numpy())
        return np.concatenate(logits), np.concatenate(tags)

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.studies), BATCH_SIZE):
            yield self._batch(self.studies[start : start + BATCH_SIZE])

    def _batch(self, studies: Sequence[Study]) -> Batch:
        blind = self.stage.image_blind
        images = torch.zeros(len(studies), 0)
        laterals = [i for i, s in enumerate(studies) if self.stage.lateral and s.lateral is not None]
        if not blind:
            files = [s.image for s in studies] + [studies[i].lateral for i in laterals]
            images = torch.from_numpy(np.stack([load_pixels(file, self.parts.preprocessing) for file in files if file]))
        names = self.stage.tell_findings
        seen = [prompted_findings(tags, names) for tags in self.study_tags(studies)] if names else [None] * len(studies)
        openings: list[str] = []
        if self.consensus is not None:
            pairs = zip(studies, seen, strict=True)
            openings, studies = retarget(studies, [self.consensus(s, s.context, names) for s, names in pairs])
        contexts = [s.context for s in studies]
        return collate(self.parts, studies, contexts, images, seen, laterals, openings).to(self.device)


def tag_auc(scores: np.ndarray, tags: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve for the first four tags, and the mean over all tags with enough positives."""
    from sklearn.metrics import roc_auc_score

    areas = {}
    for i, name in enumerate(TAGS):
        known = tags[:, i] >= 0
        if LEAST_POSITIVES <= tags[known, i].sum() < known.sum():
            areas[name] = float(roc_auc_score(tags[known, i], scores[known, i]))
    first = {f"auc_{name}": areas[name] for name in TAGS[:4] if name in areas}
    return first | ({"auc_mean": float(np.mean(list(areas.values())))} if areas else {})


def choose_thresholds(
    views: np.ndarray, tags: np.ndarray, names: tuple[str, ...], openings: dict[str, str]
) -> ImageFindings:
    """Choose thresholds of findings, and the weight of the lateral radiograph.

    The threshold of ``abnormal``, without which no other finding counts, has the best balanced accuracy. The threshold
    of another finding is such that it is reported as often as it occurs; most are too rare to choose more. A finding
    without a positive or without a negative validation study is left out. The lateral radiograph has the same weight as
    the frontal one, unless another of :data:`LATERAL_SHARES` improves a finding's AUC by :data:`LEAST_GAIN`.

    Args:
        views: logits of :meth:`Validation.tag_logits`, float [studies, 2, TAGS].
        tags: 1, 0 or -1, [studies, TAGS].

    Raises:
        ValueError: no validation study is known to be abnormal, or none to be normal.
    """
    varies = (tags == 1).any(0) & (tags == 0).any(0)
    if not varies[0]:
        raise ValueError("no threshold for 'abnormal': some validation studies must be abnormal and some normal")
    names = tuple(name for name in names if varies[TAGS.index(name)])
    known = (TAGS[0], *names)
    columns = [TAGS.index(name) for name in known]
    paired = not np.isnan(views[:, 1]).all()
    shares = tuple(_best_share(views[:, :, c], tags[:, c]) for c in columns) if paired else ()
    scores = np.zeros(tags.shape)
    for column, share in zip(columns, shares or (0.0,) * len(columns), strict=True):
        scores[:, column] = scores_of(_joined(views[:, :, column], share))
    thresholds = [_best_gate(scores[:, 0], tags[:, 0])]
    for column in [TAGS.index(name) for name in names]:
        share = (tags[:, column] == 1).sum() / max(1, (tags[:, column] >= 0).sum())
        thresholds.append(float(np.quantile(scores[:, column], 1 - min(share, 0.5))))
    sentences = tuple(openings.get(name, "") for name in known) if openings else ()
    return ImageFindings(known, tuple(thresholds), sentences, lateral_shares=shares)


def _joined(views: np.ndarray, share: float) -> np.ndarray:
    """Logits of one finding and both views, [studies, 2] → [studies]."""
    return np.where(np.isnan(views[:, 1]), views[:, 0], (1 - share) * views[:, 0] + share * views[:, 1])


def _best_share(views: np.ndarray, tags: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    known = tags >= 0
    if not LEAST_POSITIVES <= (tags[known] == 1).sum() < known.sum():
        return 0.5
    areas = {share: roc_auc_score(tags[known], _joined(views[known], share)) for share in (0.5, *LATERAL_SHARES)}
    best = max(areas, key=lambda share: areas[share])
    return best if areas[best] >= areas[0.5] + LEAST_GAIN else 0.5


def _best_gate(scores: np.ndarray, tags: np.ndarray) -> float:
    known = tags >= 0
    scores, truth = scores[known], tags[known] == 1
    candidates = np.quantile(scores, np.linspace(0.02, 0.98, 97))
    balanced = [((scores[truth] >= c).mean() + (scores[~truth] < c).mean()) / 2 for c in candidates]
    return float(candidates[int(np.argmax(balanced))])
