"""Several processes that work as one; only this file calls torch.distributed. `torchrun` starts them, or one runs alone.

A batch is the same for any number of ranks, and each rank computes its own rows of it. Either DDP averages the gradients, or
FSDP2 (`fully_shard`) shards weights, gradients and optimiser state. Only the first rank reports and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MEETING = "DIT_MEETING"
"""The environment variable that names a file through which the ranks of one host find each other. Without it they use the
address that `torchrun` gives.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them, and its device. `grouped` is false for a process that `torchrun` did not start."""

    device: torch.device
    rank: int = 0
    size: int = 1
    grouped: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that reports and writes."""
        return self.rank == 0

    def local_slice(self, count: int) -> slice:
        """This rank's rows of `count`: contiguous, in the order of ranks; their numbers differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def per_rank(self, count: int, key: str) -> int:
        """`count / size`. Raises `ConfigError` that names `key` if it is not a whole number."""
        if count % self.size:
            raise ConfigError(f"{key} = {count} over {self.size} processes: expected a multiple of {self.size}")
        return count // self.size

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over ranks, on every rank; if a value is not finite on one rank, its mean is not finite."""
        self.average([values])
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over ranks."""
        if self.size == 1:
            return
        averages = dist.get_backend() == "nccl"
        operation = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
            work.wait()
        if not averages:
            torch._foreach_div_(tensors, self.size)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, on the device or the host, by the first rank's tensor."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.to(self.device)
                dist.broadcast(sent, 0)
                tensor.copy_(sent)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, on every rank; `rows` are the rows that this rank has, its `local_slice`."""
        if self.size == 1:
            return rows
        every = [Ranks(self.device, rank, self.size).local_slice(count) for rank in range(self.size)]
        lengths = [part.stop - part.start for part in every]
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in every]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def split(self, compute: Callable[[slice], tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """What `compute` returns for all `count` rows, on every rank; each rank computes its own rows.

        `compute` receives a slice that is never empty, and returns tensors with as many rows as the slice.
        """
        own = self.local_slice(count)
        mine = own.stop - own.start
        parts = compute(own if mine else slice(0, 1))
        return tuple(self.gather(part[:mine], count) for part in parts)

    def gather_state(self, state: Any) -> Any:
        """A tree of dicts, as the first rank saves it: its tensors are whole and on the CPU; on other ranks they are None."""
        if isinstance(state, dict):
            return {name: self.gather_state(part) for name, part in state.items()}
        if not isinstance(state, Tensor):
            return state
        tensor = whole(state)
        return tensor.cpu() if self.is_main else None

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network, wrapped so that the backward pass averages its gradients over ranks (DDP)."""
        if not self.grouped:
            return network
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids, gradient_as_bucket_view=True)

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], precision: torch.dtype, compiled: bool = False) -> None:
        """Shard each of the `blocks` of `model`, and then the rest of it, over all ranks (FSDP2); compile blocks if `compiled`.

        Ranks exchange weights in `precision` and gradients in float32. A model on the host is moved to the device block by
        block, so that no device ever holds all of it.
        """
        if not self.grouped:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        reduced = None if precision == torch.float32 else precision
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if compiled:
            for block in blocks:
                block.compile()
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The group of processes that `torchrun` started; without it, this process alone. On GPUs, each rank uses its own."""
    if "RANK" not in os.environ:
        yield Ranks(device)
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} has no GPU: at most {torch.cuda.device_count()} processes can run here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    where = f"file://{os.environ[MEETING]}" if MEETING in os.environ else "env://"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=size, device_id=own)
    yield Ranks(device, rank, size, grouped=True)
    dist.destroy_process_group()  # not after an error: the other ranks may be waiting, and torchrun ends them


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; a tensor that is not sharded is returned as it is."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if _sharded(tensor) else tensor


@torch.no_grad()
def restore(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Set every tensor, sharded or not, to the whole tensor of the same name in `saved`, which may be on any device."""
    for name, tensor in tensors.items():
        tensor.copy_(distributed_like(saved[name], tensor))


def distributed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The whole tensor `tensor`, sharded like `other`; returned as it is if `other` is not sharded."""
    if not _sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


def _sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor  # imported here: it takes a second, and most stages do not need it

    return isinstance(tensor, DTensor)
