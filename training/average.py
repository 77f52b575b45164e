"""``python -m training average``: the mean of several runs' weights (a model soup, Wortsman et al., ICML 2022).

Runs that begin with the same checkpoint and differ in their seeds end near one another, and the mean of their weights
sees a little better than any one of them, at the cost of one. Adapters are merged first: what is averaged is what the
adapters stand for.
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
    """The averaged model with its findings' thresholds chosen anew on validation studies, and their AUC there.

    Args:
        runs: folders of finished runs, two or more, that began with the same checkpoint.
        data: the collection whose validation studies are used.
        cache: where base weights are kept.

    Raises:
        FileNotFoundError: a folder is no finished run.
        ValueError: there are fewer than two, they began with different checkpoints, or tell no findings.
    """
    bases = {checkpoint_of(run) for run in runs}
    if len(runs) < 2 or len(bases) > 1:
        found = f"they began with {', '.join(sorted(bases))}" if len(bases) > 1 else "there is one"
        raise ValueError(f"an average needs two runs or more from the same checkpoint: {found}")
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
    told = parts.finding_head or load_adapted(base, [], cache).finding_head
    if told is None:
        raise ValueError(f"neither the runs nor {base} tell findings: there is nothing to choose thresholds for")
    validation = _validation(parts, config, data)
    names = told.findings.names[1:]
    openings = dict(zip(told.findings.names, told.findings.openings, strict=False))
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
