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


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """About `U V^T` of each one's singular value decomposition.

    The iteration is carried out on the smaller Gram matrices, with which its factors commute, many of one size at once,
    and its product applied at the end.
    """
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    unit = [matrix / (matrix.norm() + 1e-7) for matrix in matrices]
    grams = [x.T @ x if is_tall else x @ x.T for x, is_tall in zip(unit, tall, strict=True)]
    whole: dict[int, torch.Tensor] = {}
    for size in {len(gram) for gram in grams}:
        alike = [index for index, gram in enumerate(grams) if len(gram) == size]
        whole.update(zip(alike, _iterated(torch.stack([grams[index] for index in alike])), strict=True))
    return [x @ whole[i] if is_tall else whole[i] @ x for i, (x, is_tall) in enumerate(zip(unit, tall, strict=True))]


def _iterated(gram: torch.Tensor) -> torch.Tensor:
    """`[n, m, m]` -> the product of the iteration's factors."""
    a, b, c = _COEFFICIENTS
    whole = one = torch.eye(gram.shape[-1]).expand_as(gram)
    for _ in range(_ITERATIONS):
        factor = torch.baddbmm(a * one + b * gram, gram, gram, alpha=c)
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole


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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["muon"]:
                self._muon(weights, group)
            else:
                for weight in weights:
                    self._adam(weight, self.state[weight], group)

    def _muon(self, weights: list[torch.Tensor], group: dict) -> None:
        moves = []
        for weight in weights:
            grad, state = weight.grad.flatten(1), self.state[weight]
            momentum = state.setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 0.05)
            moves.append(grad.lerp(momentum, 0.95))
        rate = group["lr"] * group["matrix_rate"]
        for weight, way in zip(weights, orthogonal(moves), strict=True):
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
