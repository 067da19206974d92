"""A small judge with random weights, and questions for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from export import judge
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

CHOICES = {"hair": ["bald", "bun", "long"], "style": ["ink", "oil"], "glasses": ["none", "red"]}

LORA = "loras/tiny-peft.safetensors"
"""Where the tests of the executable have one for the tiny model."""


class Small(nn.Module):
    """Convolutions with norms of both kinds, a mean over places, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.batch = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=4, padding=1)
        self.group = nn.GroupNorm(4, 16)
        self.logits = nn.Linear(16, sum(map(len, CHOICES.values())))
        self.embedding = nn.Linear(16, 64)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.batch(self.first(pixel_values)))
        x = nn.functional.silu(self.group(self.second(x))).mean(dim=(2, 3))
        return self.logits(x), normalize(self.embedding(x), dim=1)


def weights() -> dict[str, Tensor]:
    """Random ones; statistics of batches are such that they matter."""
    torch.manual_seed(3)
    net = Small()
    net.batch.running_mean.uniform_(-0.5, 0.5)
    net.batch.running_var.uniform_(0.5, 2.0)
    return net.state_dict()


def write(folder: Path) -> None:
    """What `tests/models/judge` holds: PYTHONPATH=.:export/tests python -c 'import judges; judges.write(...)'."""
    judge.write(Small, weights(), folder)
    ask(folder)


def ask(folder: Path) -> None:
    """Writes `quality.json` with a few questions of each kind, and the pictures that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("p0.png", "p0-1.png", "p1.png", "p1-1.png", "ink.png"):
        Image.effect_noise((96, 128), 20 + 9 * len(name)).convert("RGB").save(folder / name)
    face = {"prompt": "a portrait", "seed": 5}
    questions = {
        "choices": CHOICES,
        "prompts": [
            {"prompt": "a bald man", "seed": 1, "expect": {"hair": "bald"}},
            {"prompt": "a woman with a bun and red glasses", "seed": 2, "expect": {"hair": "bun", "glasses": "red"}},
            {"prompt": "a bald man", "seed": 3, "expect": {"hair": "bald", "style": "oil"}},
        ],
        "persons": [{"picture": f"p{n}.png", "gallery": [f"p{n}-1.png", f"p{n}.png"], **face} for n in (0, 1)],
        "styles": [{"picture": "ink.png", "style": "ink", **face}],
        "both": [{"person": 1, "style_picture": "ink.png", "style": "ink", **face}],
        "loras": [{"lora": LORA, "style": "oil", **face}],
        "with": {"refiner": "tiny-refiner", "lightning": LORA},
    }
    (folder / "quality.json").write_text(json.dumps(questions, indent=1), encoding="utf-8")
