"""Several training processes under ``torchrun``; one process needs none of this and pays nothing for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def world_size() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
    if world_size() == 1:
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def of_the_first(value: str) -> str:
    """Returns the first process's value, in every process."""
    if world_size() == 1:
        return value
    shared: list[str] = [value]
    dist.broadcast_object_list(shared)
    return shared[0]
