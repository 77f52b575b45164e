"""What every base model consists of: the InstructBLIP model, its tokenizers, preprocessing and finding head."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerBase

from cbedge.findings.image_findings import ImageFindings, scores_of
from cbedge.images.preprocess import Preprocessing
from training.fetch import BasePart
from training.processor import save_preprocessing
from training.views import by_study

_FINDING_HEAD = "finding_head"


@dataclass(frozen=True)
class FindingHead:
    """A linear head that scores findings, each from one query of the Q-Former's output.

    Attributes:
        queries: index of each finding's query, int [T].
        weight: float [T, H]; ``bias``: float [T].
        findings: names and thresholds, in the same order.
    """

    queries: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    findings: ImageFindings

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Queries int64 [T], weight and bias, as :class:`cbedge.backends.torch_model.TorchBackend` takes them."""
        return {"queries": torch.tensor(self.queries), "weight": self.weight, "bias": self.bias}

    def logits(self, output: Tensor) -> Tensor:
        """Q-Former output [B, Q, H] → [B, T]."""
        weight, bias = self.weight.to(output.device), self.bias.to(output.device)
        return (output[:, list(self.queries)].float() * weight).sum(-1) + bias

    def read(self, output: Tensor, count: int | None = None, laterals: Tensor | None = None) -> list[tuple[str, ...]]:
        """Q-Former output [N, Q, H] → the present findings of each study.

        Args:
            output: of the frontal radiographs of ``count`` studies, followed by the lateral ones.
            count: number of studies; ``None`` if there are only frontal radiographs.
            laterals: int64 [N - count], the study index of each lateral radiograph.
        """
        logits = self.logits(output).detach().cpu()
        if count is None or laterals is None or not len(laterals):
            return [self.findings.read(scores_of(row)) for row in logits.numpy()]
        views, there = (t.numpy() for t in by_study(logits, count, laterals.cpu()))
        joined = np.where(there[:, 1:], self.findings.join(views[:, 0], views[:, 1]), views[:, 0])
        return [self.findings.read(scores_of(row)) for row in joined]


@dataclass
class ModelAndTokenizers:
    """A model with its tokenizers, preprocessing and finding head.

    Attributes:
        image_token_id: placeholder in ``input_ids`` that image embeddings replace.
        finding_head: scores the findings that the prompt lists; ``None`` for a model without finding scores.

    Raises:
        ValueError: preprocessing gives another image size than the vision encoder reads.
    """

    model: InstructBlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    qformer_tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    finding_head: FindingHead | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        size = self.model.config.vision_config.image_size
        if self.preprocessing.image_size != size:
            raise ValueError(
                f"preprocessing gives {self.preprocessing.image_size} rows and columns, the vision encoder reads {size}"
            )

    @property
    def reads_lateral(self) -> bool:
        """Whether the model was trained to read a lateral radiograph together with the frontal one."""
        return bool(getattr(self.model.config, "reads_lateral", False))

    def save(self, folder: Path) -> None:
        """Write the model, tokenizers and preprocessing to ``folder`` in transformers' InstructBLIP layout, and the
        finding head."""
        self.model.save_pretrained(folder)
        save_preprocessing(self.preprocessing, self.model.config.num_query_tokens, folder)
        self.tokenizer.save_pretrained(folder)
        self.qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
        if self.finding_head is not None:
            save_finding_head(self.finding_head, folder)


@dataclass(frozen=True)
class Base:
    """A base model that is assembled from downloaded weights.

    Attributes:
        assemble: makes the model, in fp32, from the cache folder and keyword arguments: ``seed``, and the
            configuration's ``base_options``.
        weights: the files that it downloads, with their origins and licences.
        image_side: ``base_options`` of a small language model, for work on the image side alone.
    """

    assemble: Callable[..., ModelAndTokenizers]
    weights: tuple[BasePart, ...] = ()
    image_side: Mapping[str, Any] = field(default_factory=dict)


def save_finding_head(head: FindingHead, folder: Path) -> None:
    """Write ``finding_head.safetensors`` and ``finding_head.json``."""
    save_file({"weight": head.weight, "bias": head.bias}, folder / f"{_FINDING_HEAD}.safetensors")
    values = asdict(head.findings) | {"queries": head.queries}
    (folder / f"{_FINDING_HEAD}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_finding_head(folder: Path) -> FindingHead | None:
    """Read what :func:`save_finding_head` wrote; ``None`` if there is none."""
    path = folder / f"{_FINDING_HEAD}.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(folder / f"{_FINDING_HEAD}.safetensors")
    return FindingHead(tuple(values["queries"]), tensors["weight"], tensors["bias"], ImageFindings.from_json(values))
