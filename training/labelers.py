"""Standard labelers, if their weights are available: CheXbert's 14 labels, and RadGraph F1.

Their weights may not be redistributed, so the user gives their paths. CheXbert (Smit et al., EMNLP 2020) is BERT with
one classifier per label. RadGraph F1 (Delbrouck et al. 2022, package ``radgraph``) compares the entities and relations
that the RadGraph model (Jain et al., NeurIPS 2021) finds in draft and reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import nn

from training.clinical import Labels, clinical_scores
from training.fetch import BASE_PARTS, DEFAULT_CACHE, fetch_base
from training.findings import CHEXPERT_FINDINGS, LABELS, NO_FINDING

_HEADS = (*CHEXPERT_FINDINGS, NO_FINDING)  # the order of CheXbert's classifiers
_POSITIVE, _UNCERTAIN = 1, 3
_MAX_TOKENS = 512
_RADGRAPH_FILES = ("config.json", "weights.th", "vocabulary")


class Chexbert:
    """Labels reports with CheXbert's published weights.

    Args:
        weights: ``chexbert.pth``, as published; only tensors are read, no code in it runs.
        tokenizer: folder of the tokenizer of ``bert-base-uncased``; default is the mini model's Q-Former tokenizer,
            which has the same vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not CheXbert's, or the tokenizer has another vocabulary.
    """

    def __init__(self, weights: Path, tokenizer: Path | None = None, cache: Path = DEFAULT_CACHE, batch_size: int = 32):
        from transformers import AutoTokenizer, BertConfig, BertModel

        if not Path(weights).is_file():
            raise FileNotFoundError(f"no CheXbert weights at {weights}: give the path of chexbert.pth")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = {name.removeprefix("module."): value for name, value in state["model_state_dict"].items()}
            words, width = state["bert.embeddings.word_embeddings.weight"].shape
            layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
            positions = state["bert.embeddings.position_embeddings.weight"].shape[0]
            inner = state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
        except (UnpicklingError, KeyError, TypeError, AttributeError, RuntimeError, ValueError, EOFError) as error:
            raise ValueError(f"{weights} is not CheXbert's chexbert.pth ({type(error).__name__})") from None
        if tokenizer is None:
            part = next(p for p in BASE_PARTS if p.name == "qformer")
            tokenizer = fetch_base(part, cache).parent
        self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        if len(self.tokenizer) != words:
            raise ValueError(
                f"{tokenizer} has {len(self.tokenizer):,} words, CheXbert {words:,}: "
                "give the tokenizer of bert-base-uncased"
            )
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // 64),
            intermediate_size=inner,
            max_position_embeddings=positions,
        )
        self.bert = BertModel(config)
        self.heads = nn.ModuleList(nn.Linear(width, 2 if name == NO_FINDING else 4) for name in _HEADS)
        known = {n: v for n, v in state.items() if not n.endswith("position_ids")}
        self.bert.load_state_dict({n[5:]: v for n, v in known.items() if n.startswith("bert.")})
        self.heads.load_state_dict({n[13:]: v for n, v in known.items() if n.startswith("linear_heads.")})
        self.bert.eval()
        self.batch_size = batch_size

    @torch.inference_mode()
    def label(self, reports: Sequence[str]) -> Labels:
        """The 14 labels of each report, in the order of :data:`training.findings.LABELS`.

        A label is present if CheXbert's class is positive or uncertain, as usual for factual scores.
        """
        rows = []
        for start in range(0, len(reports), self.batch_size):
            texts = [" ".join(report.split()) for report in reports[start : start + self.batch_size]]
            encoded = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_token_type_ids=False,
                return_tensors="pt",
            )
            pooled = self.bert(**encoded).last_hidden_state[:, 0]
            classes = torch.stack([head(pooled).argmax(-1) for head in self.heads], dim=1).numpy()
            rows.append(np.isin(classes, (_POSITIVE, _UNCERTAIN)))
        found = np.concatenate(rows) if rows else np.zeros((0, len(_HEADS)), bool)
        matrix = found[:, [_HEADS.index(label) for label in LABELS]]
        return Labels(matrix, ~matrix[:, LABELS.index(NO_FINDING)])


def radgraph_f1(drafts: Sequence[str], references: Sequence[str], folder: Path) -> dict[str, float]:
    """RadGraph F1: ``simple`` (entities), ``partial`` (and whether they have a relation), ``complete``.

    Args:
        drafts, references: one each per study.
        folder: contains ``radgraph/`` with the unpacked model (``config.json``, ``weights.th``, ``vocabulary/``).

    Raises:
        FileNotFoundError: the model is missing; nothing is downloaded.
        ImportError: the package ``radgraph`` is not installed.
    """
    missing = [name for name in _RADGRAPH_FILES if not (Path(folder) / "radgraph" / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}/radgraph has no {missing[0]}: unpack RadGraph's model there")
    try:
        from radgraph import F1RadGraph
    except ImportError:
        raise ImportError("RadGraph F1 needs the package radgraph; type: pip install radgraph") from None
    scorer = F1RadGraph(reward_level="all", model_type="radgraph", model_cache_dir=str(folder))
    means = scorer(refs=list(references), hyps=list(drafts))[0]
    return dict(zip(("simple", "partial", "complete"), map(float, means), strict=True))


def outside_scores(
    drafts: dict[str, list[str]], references: list[str], chexbert: Chexbert | None, radgraph: Path | None
) -> dict[str, dict[str, float]]:
    """The scores of each row of drafts by the available labelers; empty without labelers."""
    found: dict[str, dict[str, float]] = {row: {} for row in drafts}
    if chexbert is not None:
        truth = chexbert.label(references)
        for row, texts in drafts.items():
            scores = clinical_scores(chexbert.label(texts), truth)
            wanted = ("micro_precision", "micro_recall", "micro_f1", "macro_f1", "finding_f1")
            found[row] |= {f"CheXbert {name}": scores[name] for name in wanted}
    if radgraph is not None:
        for row, texts in drafts.items():
            found[row] |= {f"RadGraph F1 {k}": v for k, v in radgraph_f1(texts, references, radgraph).items()}
    return {row: scores for row, scores in found.items() if scores}
