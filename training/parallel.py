"""Train one model with several processes.

``accelerate launch`` or ``torchrun --nproc-per-node 4 -m training run …`` starts the processes; torch's
DistributedDataParallel averages gradients. Losses are weighted by the number of items in each process's share, so that
their average equals the loss of one process for the whole batch.

If the language model is too large for one GPU, its layers are sharded (torch's FSDP2): each process keeps a part of
every frozen weight, and a layer's weights are gathered while it runs. Trained parts and adapters are small and not
sharded.
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


def choose_device(name: str) -> torch.device:
    """Resolve a device; ``auto`` is CUDA if it is available.

    Raises:
        RuntimeError: CUDA was requested and is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("CUDA was requested, but torch finds no CUDA device: give --device cpu")
    return torch.device(name)


class Processes:
    """The processes of this run; a single process needs no communication.

    Args:
        device: ``cpu`` or ``cuda``; with several processes, each gets its own GPU.
    """

    def __init__(self, device: torch.device):
        # Validation with drafts runs in one process while the others wait, longer than the default timeout.
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
        """Run an action in the main process, then in the others, which can use the files that it wrote."""
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
        """Keep only this process's part of the weights of each layer. Call it once, before adapters are added.

        Returns:
            Bytes of the language model's weights, and of the part that this process keeps.
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
        """Average gradients over processes if the model is sharded; otherwise :meth:`wrap` does it."""
        if not self.sharded:
            return
        for parameter in parameters:
            if parameter.grad is None:  # unused in this process, but perhaps not in others
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.count

    def validating(self, action: Callable[[], Any]) -> None:
        """Run an action that uses the language model: in the main process, or in all if it is sharded."""
        if self.sharded:
            action()
            self.accelerator.wait_for_everyone()
        else:
            self.only_main(action)

    def share(self, rows: list[T]) -> list[T]:
        """This process's part of a batch.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        if len(rows) % self.count:
            raise ValueError(f"a batch of {len(rows)} cannot be split among {self.count} processes: change batch_size")
        return rows[self.rank :: self.count]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, wrapped so that gradients are averaged over processes; unchanged if the model is sharded, see
        :meth:`average_gradients`."""
        return module if self.count == 1 or self.sharded else self.accelerator.prepare_model(module)

    def without_sync(self, module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """Do not average gradients, in all but the last of accumulated passes."""
        return self.accelerator.no_sync(module) if wanted and self.count > 1 and not self.sharded else nullcontext()

    def weigh(self, mean: Tensor, count: Tensor) -> Tensor:
        """Scale a mean over ``count`` items so that its average over processes is the mean over all items."""
        if self.count == 1:
            return mean
        total = self.accelerator.reduce(count.detach().clone().float(), "sum")
        return mean * (self.count * count / total.clamp_min(1))

    def average(self, value: Tensor) -> float:
        """The mean of a number over processes."""
        return float(value.detach() if self.count == 1 else self.accelerator.reduce(value.detach().clone(), "mean"))


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """[B, …] of each process → [processes · B, …], with gradients; the tensor itself for one process or without
    gradients."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or not torch.is_grad_enabled():
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor))
