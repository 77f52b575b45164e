"""Studies of one or two radiographs: a batch holds every frontal one first, then the lateral ones that there are."""

import torch
from torch import Tensor


def by_study(rows: Tensor, count: int, laterals: Tensor) -> tuple[Tensor, Tensor]:
    """Images' rows, put together by study.

    Args:
        rows: [N, ...], of ``count`` studies' frontal radiographs and then of the lateral ones.
        count: B.
        laterals: int64 [N - B], the study of each lateral radiograph.

    Returns:
        [B, V, ...], zero where a study has no lateral radiograph, and which of them are there, bool [B, V]; V is 1
        where no study has one, else 2.
    """
    there = torch.ones(count, 1, dtype=torch.bool, device=rows.device)
    if not len(laterals):
        return rows.unsqueeze(1), there
    second = torch.zeros_like(rows[:count]).index_copy(0, laterals, rows[count:])
    has = torch.zeros_like(there).index_fill(0, laterals, True)
    return torch.stack([rows[:count], second], 1), torch.cat([there, has], 1)


def mean_by_study(rows: Tensor, count: int, laterals: Tensor) -> Tensor:
    """The same [N, ...], averaged over the radiographs of each study: [B, ...]."""
    stacked, there = by_study(rows, count, laterals)
    return stacked.sum(1) / there.sum(1).reshape(count, *[1] * (rows.dim() - 1))
