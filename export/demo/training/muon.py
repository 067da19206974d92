"""Muon (Jordan et al., 2024): momentum made orthogonal, for matrices and convolutions; AdamW for the rest.

A step costs little more than AdamW's beside the passes of a small network, and goes further, which is what counts
where a batch takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration makes singular values about 1; the authors'."""
_ITERATIONS = 5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About `U V^T` of the singular value decomposition."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """`rate` is AdamW's; matrices move by `matrix_rate` for each unit of it, in units of their spectral norm."""

    def __init__(self, nets: Iterable[nn.Module], rate: float, matrix_rate: float = 10.0, decay: float = 0.01) -> None:
        matrices, others = [], []
        for net in nets:
            tables = {id(layer.weight) for layer in net.modules() if isinstance(layer, nn.Embedding)}
            for weight in net.parameters():
                if weight.requires_grad:
                    is_matrix = weight.ndim in (2, 4) and min(weight.shape[:2]) > 4 and id(weight) not in tables
                    (matrices if is_matrix else others).append(weight)
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(groups, {"lr": rate, "matrix_rate": matrix_rate, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Moves every weight that has a gradient."""
        for group in self.param_groups:
            move = self._muon if group["muon"] else self._adam
            for weight in group["params"]:
                if weight.grad is not None:
                    move(weight, self.state[weight], group)

    @staticmethod
    def _muon(weight: torch.Tensor, state: dict, group: dict) -> None:
        grad = weight.grad.flatten(1)
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 0.05)
        way = orthogonal(grad.lerp(momentum, 0.95))
        rate = group["lr"] * group["matrix_rate"]
        weight.mul_(1.0 - rate * group["decay"])
        weight.add_(way.view_as(weight), alpha=-rate * max(1.0, way.shape[0] / way.shape[1]) ** 0.5)

    @staticmethod
    def _adam(weight: torch.Tensor, state: dict, group: dict) -> None:
        count = state["count"] = state.get("count", 0) + 1
        first = state.setdefault("first", torch.zeros_like(weight)).lerp_(weight.grad, 0.1)
        second = (
            state.setdefault("second", torch.zeros_like(weight))
            .mul_(0.99)
            .addcmul_(weight.grad, weight.grad, value=0.01)
        )
        size = (second / (1.0 - 0.99**count)).sqrt_().add_(1e-8)
        weight.mul_(1.0 - group["lr"] * group["decay"])
        weight.addcdiv_(first, size, value=-group["lr"] / (1.0 - 0.9**count))
