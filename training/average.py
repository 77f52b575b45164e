"""``python -m training average``: average the weights of several runs (a model soup, Wortsman et al., ICML 2022).

If runs start from the same checkpoint and differ only in their seeds, the average of their weights is a little better
than each of them, at the cost of one model. Adapters are merged before averaging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from training.base import ModelAndTokenizers
from training.config import RunConfig, load_config
from training.datasets import open_studies
from training.losses import AlignmentHeads
from training.ontology import TAGS
from training.trained import checkpoint_of, load_adapted, merge_adapters, stage_folders
from training.validation import Validation, choose_findings, tag_auc


def average(runs: Sequence[Path], data: Path, cache: Path) -> tuple[ModelAndTokenizers, dict[str, float]]:
    """The averaged model, with new thresholds for its findings, and their AUC on validation studies.

    Args:
        runs: folders of two or more finished runs that started from the same checkpoint.
        data: folder of the collection with the validation studies.
        cache: cache folder for base weights.

    Raises:
        FileNotFoundError: a folder is not a finished run.
        ValueError: there are fewer than two runs, they started from different checkpoints, or have no finding scores.
    """
    bases = {checkpoint_of(run) for run in runs}
    if len(runs) < 2 or len(bases) > 1:
        found = f"they started from {', '.join(sorted(bases))}" if len(bases) > 1 else "there is one"
        raise ValueError(f"an average needs two or more runs from the same checkpoint, but {found}")
    base = bases.pop()
    total: dict[str, Tensor] = {}
    heads_total: dict[str, Tensor] = {}
    for run in runs:
        parts = load_adapted(base, [run], cache)
        merge_adapters(parts)
        _add(total, parts.model.state_dict())
        _add(heads_total, _heads(run))
    parts.model.load_state_dict({name: _mean(value, len(runs)) for name, value in total.items()})
    heads = _heads_of({name: _mean(value, len(runs)) for name, value in heads_total.items()})
    config = load_config(runs[-1] / "config.json", data=data)
    head = parts.finding_head or load_adapted(base, [], cache).finding_head
    if head is None:
        raise ValueError(f"neither the runs nor {base} have finding scores, so there are no thresholds to choose")
    validation = _validation(parts, config, data)
    names = head.findings.names[1:]
    openings = dict(zip(head.findings.names, head.findings.openings, strict=False))
    findings = choose_findings(validation, heads, names, openings)
    parts.finding_head = heads.finding_head(findings)
    return parts, tag_auc(*validation.tag_scores(heads))


def _validation(parts: ModelAndTokenizers, config: RunConfig, data: Path) -> Validation:
    stage = replace(config.stages[-1], tell_findings=(), open_share=0.0, learn="own", lateral=parts.reads_lateral)
    studies = open_studies(data, ("val",), config.validation_studies)
    device = torch.device("cpu")
    return Validation(parts, stage, studies, device, torch.autocast("cpu", enabled=False))


def _heads(run: Path) -> dict[str, Tensor]:
    last = stage_folders(run)[-1] / "heads.pt"
    return torch.load(last, weights_only=True, map_location="cpu")


def _heads_of(state: dict[str, Tensor]) -> AlignmentHeads:
    embed, hidden = state["image_projection.weight"].shape
    words = state["word_ids"]
    heads = AlignmentHeads(hidden, len(TAGS), words, torch.full((len(words),), 0.5), embed)
    heads.load_state_dict(state)
    return heads


def _add(total: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        if value.is_floating_point():
            total[name] = total[name] + value.double() if name in total else value.double()
        else:
            total[name] = value


def _mean(value: Tensor, count: int) -> Tensor:
    return (value / count).float() if value.is_floating_point() else value
