"""Batches of studies with one or two radiographs: all frontal radiographs first, then the lateral ones."""

import torch
from torch import Tensor


def by_study(rows: Tensor, count: int, laterals: Tensor) -> tuple[Tensor, Tensor]:
    """Group the rows of images by study.

    Args:
        rows: [N, ...] of the frontal radiographs, followed by the lateral ones.
        count: number of studies, B.
        laterals: int64 [N - B], the study index of each lateral radiograph.

    Returns:
        [B, V, ...], zero for a missing lateral radiograph; and which radiographs exist, bool [B, V]. V is 1 if no
        study has a lateral radiograph, else 2.
    """
    there = torch.ones(count, 1, dtype=torch.bool, device=rows.device)
    if not len(laterals):
        return rows.unsqueeze(1), there
    second = torch.zeros_like(rows[:count]).index_copy(0, laterals, rows[count:])
    has = torch.zeros_like(there).index_fill(0, laterals, True)
    return torch.stack([rows[:count], second], 1), torch.cat([there, has], 1)


def mean_by_study(rows: Tensor, count: int, laterals: Tensor) -> Tensor:
    """[N, ...] → the mean over the radiographs of each study, [B, ...]."""
    stacked, there = by_study(rows, count, laterals)
    return stacked.sum(1) / there.sum(1).reshape(count, *[1] * (rows.dim() - 1))
