"""Where training runs: one device or several processes under ``torchrun``, through accelerate, and what these tell each other."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from training.config import TrainConfig


def world_size() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Returns the number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Returns whether this is the process that writes what all of them made."""
    return int(os.environ.get("RANK", 0)) == 0


def new_accelerator(config: TrainConfig) -> Accelerator:
    """Returns the device, the precision and the process group (gloo on processors, NCCL on graphics cards) of a configuration.

    Raises:
        ValueError: the device or the precision that was asked for is not to be had here.
    """
    device = device_type(config)
    # accelerate keeps one state a process and refuses a second precision; here every loop has its own. A group that stands stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device == "cpu", mixed_precision=precision(config, device), gradient_accumulation_steps=config.accumulation_steps
    )


def device_type(config: TrainConfig) -> str:
    """Returns ``cuda`` or ``cpu``.

    Raises:
        ValueError: a graphics card was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("training field 'device': there is no CUDA device here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device


def precision(config: TrainConfig, device: str) -> str:
    """Returns ``no``, ``bf16`` or ``fp16``: what was asked for, or the best of a graphics card and plain float32 on a processor."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if device != "cuda":  # bfloat16 on two cores without AMX: 2.96 s a step against 3.18 s, and coarser (docs/LOG.md)
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


@contextmanager
def processes(config: TrainConfig) -> Iterator[int]:
    """Joins the process group for the duration and yields this process's rank."""
    if world_size() == 1:
        yield 0
        return
    rank = int(new_accelerator(config).process_index)
    try:
        yield rank
    finally:
        dist.destroy_process_group()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Lets the first process finish the block before the others begin it: it may write what they then find."""
    if world_size() > 1 and dist.get_rank():
        dist.barrier()
    yield
    if world_size() > 1 and not dist.get_rank():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Returns whether the flag is up anywhere: clocks differ, and a process that leaves alone would hang the others."""
    return bool(largest(float(flag)))


def largest(value: float) -> float:
    """Returns the largest of the processes' values, the same in all of them."""
    if world_size() == 1:
        return value
    values = torch.tensor(value, device=PartialState().device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return float(values)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over the processes, for models too small to be worth DistributedDataParallel's buckets."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(mean)
    mean /= world_size()
    for gradient, part in zip(gradients, torch.split(mean, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def agreed(folder: Path) -> Path:
    """Returns the first process's folder in all of them: one named after the time may differ by a second."""
    if world_size() == 1:
        return folder
    names: list[Any] = [str(folder)]
    broadcast_object_list(names)
    return Path(names[0])


def share_of(count: int) -> range:
    """Returns the places of this process's share among ``count`` rows of a batch."""
    return range(dist.get_rank(), count, world_size()) if world_size() > 1 else range(count)


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def gathered(own: Tensor, places: Sequence[int], count: int) -> Tensor:
    """Returns float[count, h]: the rows of all processes at their places in the batch, with gradients into all of them."""
    if world_size() == 1:
        return own
    empty = own.new_zeros(count, own.shape[1])
    rows: Tensor = _Sum.apply(empty.index_copy(0, torch.tensor(list(places), device=own.device), own))  # type: ignore[no-untyped-call]
    return rows
