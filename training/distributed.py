"""Several training processes under ``torchrun``; one process needs none of this and pays nothing for it."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Returns the number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def processes() -> Iterator[int]:
    """Joins the process group for the duration and yields this process's rank."""
    if world_size() == 1:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
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
    values = torch.tensor(value)
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
