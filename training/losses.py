"""The losses of a stage.

Three of them train the Q-Former without the language model:

- contrastive: image-text contrast (Li et al., BLIP-2, 2023); the Q-Former encodes image and text separately.
- tags: query i predicts tag i, so each finding has its own query.
- words: similarity of projected queries and the language model's word embeddings predicts the words of the report, so
  the projection maps into the language model's embedding space.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbedge.findings.image_findings import ImageFindings
from training.base import FindingHead, ModelAndTokenizers
from training.batches import Batch
from training.config import Stage
from training.ontology import TAGS
from training.parallel import gather_with_gradient
from training.stages import encode_images, language_loss, query_image
from training.views import by_study, mean_by_study


class AlignmentHeads(nn.Module):
    """The small heads of these losses, for training only.

    Args:
        num_tags: number of tags, at most the number of queries.
        word_ids: tokens of the words loss, int64 [W].
        word_frequency: share of training reports with each token, float [W]; initializes the bias.
    """

    word_ids: Tensor

    def __init__(self, hidden: int, num_tags: int, word_ids: Tensor, word_frequency: Tensor):
        super().__init__()
        self.image_projection = nn.Linear(hidden, 128)
        self.text_projection = nn.Linear(hidden, 128)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        self.tag_weight = nn.Parameter(torch.randn(num_tags, hidden) * 0.02)
        self.tag_bias = nn.Parameter(torch.full((num_tags,), -2.0))
        self.word_gain = nn.Parameter(torch.tensor(1.0))
        self.word_bias = nn.Parameter(torch.logit(word_frequency.clamp(1e-3, 1 - 1e-3)))
        self.register_buffer("word_ids", word_ids)

    def tag_logits(self, queries: Tensor) -> Tensor:
        """Q-Former output [B, Q, H] → [B, tags]; tag i is predicted from query i."""
        return (queries[:, : len(self.tag_bias)] * self.tag_weight).sum(-1) + self.tag_bias

    @torch.no_grad()
    def start_from(self, head: FindingHead) -> None:
        """Copy a trained finding head, whose findings must use the queries of their tags.

        Raises:
            ValueError: it uses other queries.
        """
        rows = [TAGS.index(name) for name in head.findings.names if name in TAGS]
        if rows != list(head.queries):
            raise ValueError("the checkpoint's finding head has other findings than the tags, or uses other queries")
        self.tag_weight[rows], self.tag_bias[rows] = head.weight, head.bias

    def finding_head(self, findings: ImageFindings) -> FindingHead:
        """The tag head, restricted to some findings."""
        rows = [TAGS.index(name) for name in findings.names]
        weight, bias = self.tag_weight.detach().float().cpu()[rows], self.tag_bias.detach().float().cpu()[rows]
        return FindingHead(tuple(rows), weight.clone(), bias.clone(), findings)

    @staticmethod
    def tags_loss(logits: Tensor, tags: Tensor) -> Tensor:
        """Binary cross-entropy of logits [B, tags] for tags [B, tags]: 0, 1 or -1 (unknown). Positives have three times
        the weight, because most tags are rare."""
        weight = torch.full((tags.shape[1],), 3.0, device=tags.device)
        weight[0] = 1.0
        known = tags >= 0
        losses = functional.binary_cross_entropy_with_logits(
            logits.float(), tags.clamp_min(0), pos_weight=weight, reduction="none"
        )
        return (losses * known).sum() / known.sum().clamp_min(1)

    def contrastive_loss(self, queries: Tensor, there: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Symmetric InfoNCE over the batches of all processes; the similarity of a study is that of its most similar
        query.

        Args:
            queries: [B, Q, H].
            there: which queries exist, bool [B, Q]; the first one always does.
            text: the encoded report, [B, R, H].
            text_mask: [B, R].
        """
        queries = torch.where(there.unsqueeze(-1), queries, queries[:, :1])  # a repeated query changes no maximum
        image = functional.normalize(self.image_projection(queries).float(), dim=-1)
        mask = text_mask.unsqueeze(-1)
        pooled = (text * mask).sum(1) / mask.sum(1)
        text_embed = functional.normalize(self.text_projection(pooled).float(), dim=-1)
        image, text_embed = gather_with_gradient(image), gather_with_gradient(text_embed)
        similarity = torch.einsum("iqd,jd->ijq", image, text_embed).max(-1).values / self.log_temperature.exp()
        labels = torch.arange(len(similarity), device=similarity.device)
        cross_entropy = functional.cross_entropy
        smoothing = 0.1  # many reports have the same content
        return 0.5 * (
            cross_entropy(similarity, labels, label_smoothing=smoothing)
            + cross_entropy(similarity.T, labels, label_smoothing=smoothing)
        )

    def words_loss(self, projected: Tensor, there: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy for the words of the report.

        Args:
            projected: projected queries, [B, Q, D].
            there: which queries exist, bool [B, Q].
            embedding: word embeddings, [V, D].
            targets: 0 or 1 for each word, [B, W].
        """
        words = functional.normalize(embedding[self.word_ids].float(), dim=-1)
        scores = torch.einsum("bqd,wd->bqw", projected.float(), words)
        scores = scores.masked_fill(~there.unsqueeze(-1), -torch.inf)
        logits = self.word_gain * scores.logsumexp(1) + self.word_bias
        return functional.binary_cross_entropy_with_logits(logits, targets) * 10


def word_vocabulary(token_ids: list[list[int]], lowest: int = 10, highest: float = 0.9) -> tuple[Tensor, Tensor]:
    """Tokens in at least ``lowest`` reports and at most a share ``highest`` of them: ids [W], share of reports [W]."""
    counts = Counter(token for ids in token_ids for token in set(ids))
    kept = sorted(t for t, n in counts.items() if n >= min(lowest, len(token_ids)) and n <= highest * len(token_ids))
    kept = kept or sorted(counts)
    return torch.tensor(kept), torch.tensor([counts[t] / len(token_ids) for t in kept])


class StageLosses(nn.Module):
    """All losses of a stage in one forward pass, each as (mean, number of items in the mean)."""

    def __init__(self, parts: ModelAndTokenizers, heads: AlignmentHeads, stage: Stage):
        super().__init__()
        self.model, self.heads, self.stage = parts.model, heads, stage
        self.parts = parts

    def forward(self, batch: Batch, encoded: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """The losses of a batch whose images are vision features (``encoded``) or pixels."""
        model, heads, wanted = self.model, self.heads, self.stage.losses
        words = (batch.labels != -100).sum()
        if self.stage.image_blind:
            batch = batch.without_placeholders(model.config.num_query_tokens)
            return {"language": (language_loss(self.parts, batch, None), words)}
        features = batch.images if encoded else encode_images(model, batch.images)
        output, projected = query_image(model, features, batch.qformer_ids, batch.qformer_mask)
        count = len(batch.tags)
        studies = torch.tensor(float(count), device=output.device)
        losses: dict[str, tuple[Tensor, Tensor]] = {}
        if "tags" in wanted:
            logits = mean_by_study(heads.tag_logits(output), count, batch.laterals)
            losses["tags"] = heads.tags_loss(logits, batch.tags), (batch.tags >= 0).sum()
        if "contrastive" in wanted:
            text = model.qformer(input_ids=batch.report_ids, attention_mask=batch.report_mask).last_hidden_state
            queries, there = self._all_queries(output, batch)
            value = heads.contrastive_loss(queries, there, text, batch.report_mask)
            losses["contrastive"] = value, torch.ones_like(studies)
        if "words" in wanted:
            embedding = model.get_input_embeddings().weight.detach()
            queries, there = self._all_queries(projected, batch)
            losses["words"] = heads.words_loss(queries, there, embedding, self._word_targets(batch)), studies
        if "language" in wanted:
            losses["language"] = language_loss(self.parts, batch, projected), words
        return losses

    def _all_queries(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[N, Q, D] of images → the queries of each study [B, V Q, D], and which of them exist [B, V Q]."""
        stacked, there = by_study(output, len(batch.tags), batch.laterals)
        if self.stage.lateral and stacked.shape[1] == 1:  # all processes must gather the same shape
            stacked = torch.cat([stacked, torch.zeros_like(stacked)], 1)
            there = torch.cat([there, torch.zeros_like(there)], 1)
        return stacked.flatten(1, 2), there.repeat_interleave(output.shape[1], 1)

    def _word_targets(self, batch: Batch) -> Tensor:
        ids = self.heads.word_ids
        targets = torch.zeros(len(batch.report_tokens), len(ids), device=ids.device)
        for row, tokens in enumerate(batch.report_tokens):
            targets[row] = torch.isin(ids, torch.tensor(tokens, device=ids.device)).float()
        return targets
