"""A stage of training: so many steps, kept on disk every few minutes, taken up from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from export.demo.training import workers
from export.demo.training.muon import Muon

_KEEP_EVERY = 180.0
"""Seconds between states on disk."""
_LOG_EVERY = 20.0

Losses = dict[str, torch.Tensor]


@dataclass
class Stage:
    """Networks that learn together, by Muon."""

    name: str
    folder: Path
    nets: dict[str, nn.Module]
    steps: int
    rate: float
    """Learning rate: rises over the first steps, stays, and falls to nothing over the last two fifths."""
    half_life: float = 300.0
    """Steps after which a step's weights count half in the means, at most a tenth of those gone."""
    average: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Means of their weights over the last steps, which are what is used."""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    """Networks that are used and stay as they are."""

    @property
    def path(self) -> Path:
        """Where its state is kept."""
        return self.folder / f"{self.name}.pt"

    def run(self, losses: Callable[[int, torch.Generator], Losses]) -> None:
        """Trains to the last step and leaves the means in the networks. `losses` of each draw are summed."""
        done, optimiser = self._begin()
        kept = said = time.monotonic()
        seen: dict[str, list[float]] = {}
        for net in self.nets.values():
            net.train()
        for step in range(done, self.steps):
            for group in optimiser.param_groups:
                group["lr"] = self.rate * self._share(step)
            draw = step * workers.count() + workers.rank()
            parts = losses(draw, torch.Generator(torch.get_default_device()).manual_seed(draw))
            optimiser.zero_grad(set_to_none=True)
            sum(parts.values()).backward()
            weights = [weight for group in optimiser.param_groups for weight in group["params"]]
            workers.averaged(weights)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            self._follow(step)
            for name, loss in parts.items():
                seen.setdefault(name, []).append(float(loss.detach()))
            now = time.monotonic()
            if now - said > _LOG_EVERY and workers.rank() == 0:
                means = ", ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in seen.items())
                print(f"{time.strftime('%H:%M:%S')} {self.name} {step + 1}/{self.steps}: {means}", flush=True)
                said, seen = now, {}
            if now - kept > _KEEP_EVERY:
                self._keep(step + 1, optimiser)
                kept = now
        if done < self.steps:
            self._keep(self.steps, optimiser)
        self._use_average()

    def _use_average(self) -> None:
        """Puts the means into the networks, for use."""
        for name, net in self.nets.items():
            net.load_state_dict({**net.state_dict(), **self.average[name]})
            net.eval()

    def _begin(self) -> tuple[int, torch.optim.Optimizer]:
        optimiser = Muon(self.nets.values(), self.rate)
        if not self.path.is_file():
            self.average = {name: _floats(net) for name, net in self.nets.items()}
            return 0, optimiser
        state = torch.load(self.path, map_location=torch.get_default_device())
        for name, net in self.nets.items():
            net.load_state_dict(state["nets"][name])
        optimiser.load_state_dict(state["optimiser"])
        self.average = state["average"]
        return state["step"], optimiser

    def _keep(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        if workers.rank():
            return
        state = {
            "step": step,
            "nets": {name: net.state_dict() for name, net in self.nets.items()},
            "optimiser": optimiser.state_dict(),
            "average": self.average,
        }
        half_written = self.path.with_suffix(".part")
        torch.save(state, half_written)
        half_written.replace(self.path)

    def _share(self, step: int) -> float:
        return min(1.0, (step + 1) / 100, (self.steps - step) / (0.4 * self.steps))

    def _follow(self, step: int) -> None:
        keep = 0.5 ** (1.0 / max(1.0, min(self.half_life, step / 10)))
        with torch.no_grad():
            for name, net in self.nets.items():
                now = _floats(net, copy=False)
                torch._foreach_lerp_(list(self.average[name].values()), list(now.values()), 1.0 - keep)


def _floats(net: nn.Module, copy: bool = True) -> dict[str, torch.Tensor]:
    """Weights that learn."""
    return {
        name: weight.detach().clone() if copy else weight.detach()
        for name, weight in net.named_parameters()
        if weight.requires_grad
    }
