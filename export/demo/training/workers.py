"""Processes that train together, started by `torchrun`: each draws its own batches, and gradients are averaged.

On few cores, two processes of one thread do more than one process of two threads: layers this small do not divide well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from torch import distributed


def join() -> None:
    """Joins the others, where there are any. They share the cores of a machine; a GPU is for one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.get_default_device().type != "cpu":
            raise ValueError("several processes train on a CPU only; start one, or add --device cpu")
        distributed.init_process_group("gloo", timeout=timedelta(hours=3))


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def once(work: Callable[[], None]) -> None:
    """Has the first do something that leaves files, for which the others wait."""
    if rank() == 0:
        work()
    wait()


def wait() -> None:
    """Waits for all others to come here."""
    if distributed.is_initialized():
        distributed.barrier()


def averaged(weights: Iterable[torch.Tensor]) -> None:
    """Makes every gradient the mean of all workers'."""
    if not distributed.is_initialized():
        return
    weights = list(weights)
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    whole = torch.cat([weight.grad.flatten() for weight in weights])
    distributed.all_reduce(whole)
    parts = (whole / count()).split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)
