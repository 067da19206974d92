"""The judge of generated pictures: what is shown, in which style, and who; plain convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from export.demo import people
from export.demo.training.train_clip import CHOICES

EMBEDDING = 64
JUDGED: dict[str, tuple[str, ...]] = {**CHOICES, "style": (*CHOICES["style"], people.LEARNT_STYLE)}
"""Parameters in the order of the logits, and their values."""
_WIDTHS = (16, 32, 64, 64, 128, 128)
_STRIDES = (2, 2, 2, 1, 2, 2)


class Judge(nn.Module):
    """`pixel_values` `[n, 3, 128, 128]`, 0 to 1 -> `logits` `[n, all values]`, `embedding` `[n, 64]` of unit length."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *_WIDTHS)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            for before, width, stride in zip(widths, _WIDTHS, _STRIDES, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in _WIDTHS)
        self.hidden = nn.Linear(16 * _WIDTHS[-1], 256)
        self.logits = nn.Linear(256, sum(len(values) for values in JUDGED.values()))
        self.embedding = nn.Linear(256, EMBEDDING)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        hidden = self.seen(pixel_values)
        return self.logits(hidden), functional.normalize(self.embedding(hidden), dim=-1)

    def seen(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[n, 256]`."""
        x = 2.0 * pixel_values - 1.0
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return torch.relu(self.hidden(x.flatten(1)))


def by_name(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits of each parameter."""
    return dict(zip(JUDGED, logits.split([len(values) for values in JUDGED.values()], dim=-1), strict=True))
