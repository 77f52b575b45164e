"""Several processes that train one model: what each takes of a batch, and how their losses make one loss.

Processes are started by ``accelerate launch`` or ``torchrun --nproc-per-node 4 -m training run …``; gradients are
averaged by torch's DistributedDataParallel. Losses are weighed by what each process's share counts, so that their
average is the loss that one process would have found for the whole batch.

Where the language model is too large for one GPU, its layers are sharded (torch's FSDP2): each process keeps a part of
every frozen weight, and a layer's weights are gathered for the moment that it runs. What is trained, adapters and image
parts, is small and whole in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        self.sharded = False

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

    def shard(self, language_model: nn.Module) -> tuple[int, int]:
        """Keep but this process's part of the weights of each layer; alone, all of them.

        Done once, before adapters are added: they stay whole.

        Returns:
            Bytes of the language model's weights, and of those that this process keeps.
        """
        whole = sum(p.numel() * p.element_size() for p in language_model.parameters())
        if self.count == 1:
            return whole, whole
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh(self.device.type, (self.count,))
        language_model.requires_grad_(False)
        for layers in [m for m in language_model.modules() if isinstance(m, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.sharded = True
        local = [p.to_local() if isinstance(p, DTensor) else p for p in language_model.parameters()]
        return whole, sum(p.numel() * p.element_size() for p in local)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over processes where :meth:`wrap` does not see to it."""
        if not self.sharded:
            return
        for parameter in parameters:
            if parameter.grad is None:  # not used here, but perhaps elsewhere
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.count

    def validating(self, action: Callable[[], Any]) -> None:
        """Run an action that reads with the language model: in the main process, or in all where it is sharded."""
        if self.sharded:
            action()
            self.accelerator.wait_for_everyone()
        else:
            self.only_main(action)

    def share(self, rows: list[T]) -> list[T]:
        """This process's part of a batch.

        Raises:
            ValueError: the batch cannot be dealt evenly.
        """
        if len(rows) % self.count:
            raise ValueError(f"a batch of {len(rows)} cannot be dealt to {self.count} processes: change batch_size")
        return rows[self.rank :: self.count]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is to be called: gradients of its parameters are averaged over processes, but where it is
        sharded; see :meth:`average_gradients`."""
        return module if self.count == 1 or self.sharded else self.accelerator.prepare_model(module)

    def without_sync(self, module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """Leave gradients unaveraged, in all but the last of accumulated passes."""
        return self.accelerator.no_sync(module) if wanted and self.count > 1 and not self.sharded else nullcontext()

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
