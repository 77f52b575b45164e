"""Several processes that train one model: what each takes of a batch, and how their losses make one loss.

Processes are started by ``accelerate launch`` or ``torchrun --nproc-per-node 4 -m training run …``; gradients are
averaged by torch's DistributedDataParallel. Losses are weighed by what each process's share counts, so that their
average is the loss that one process would have found for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn

T = TypeVar("T")


class Processes:
    """The processes of this run; alone, every method does nothing but what its name says.

    Args:
        device: ``cpu`` or ``cuda``, as chosen; with several processes each gets its own GPU.
    """

    def __init__(self, device: torch.device):
        # Validation with drafts runs in one process while the others wait: longer than a default time-out.
        handlers = [
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ]
        self.accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers)
        self.count = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device if self.count > 1 else device

    def main_first(self, action: Callable[[], T]) -> T:
        """Run an action in the main process, then in the others, which find what it has written."""
        with self.accelerator.main_process_first():
            return action()

    def only_main(self, action: Callable[[], Any]) -> None:
        """Run an action in the main process while the others wait."""
        if self.is_main:
            action()
        self.accelerator.wait_for_everyone()

    def agree(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def share(self, rows: list[T]) -> list[T]:
        """This process's part of a batch.

        Raises:
            ValueError: the batch cannot be dealt evenly.
        """
        if len(rows) % self.count:
            raise ValueError(f"a batch of {len(rows)} cannot be dealt to {self.count} processes: change batch_size")
        return rows[self.rank :: self.count]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is to be called: gradients of its parameters are averaged over processes."""
        return module if self.count == 1 else self.accelerator.prepare_model(module)

    def without_sync(self, module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """Leave gradients unaveraged, in all but the last of accumulated passes."""
        return self.accelerator.no_sync(module) if wanted and self.count > 1 else nullcontext()

    def weigh(self, mean: Tensor, count: Tensor) -> Tensor:
        """A share's mean over ``count`` things, scaled so that its average over processes is the mean over them all."""
        if self.count == 1:
            return mean
        total = self.accelerator.reduce(count.detach().clone().float(), "sum")
        return mean * (self.count * count / total.clamp_min(1))

    def average(self, value: Tensor) -> float:
        """The mean of a number over processes."""
        return float(value.detach() if self.count == 1 else self.accelerator.reduce(value.detach().clone(), "mean"))


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """[B, …] of each process → [processes · B, …], with gradients; alone, or without gradients, the tensor itself."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or not torch.is_grad_enabled():
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor))
