"""Training of the demo model on a GPU: that every tensor of every stage lies where it should, seen without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from export.demo.training import networks, train_lightning
from export.demo.training.muon import Muon
from export.demo.training.stage import Losses, Stage
from export.demo.training.stages import Training
from export.demo.training.train_base import Seen
from export.demo.training.world import World
from torch import nn


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Another device than the CPU: torch's own for shapes alone. Mixing its tensors with the CPU's is an error."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Where losses of each stage are in its first step, which is all that it runs."""
    found: dict[str, set[str]] = {}

    @torch.no_grad()
    def run(stage: Stage, losses: Callable[[int, torch.Generator], Losses]) -> None:
        found[stage.name] = {loss.device.type for loss in losses(0, torch.Generator("cpu")).values()}

    monkeypatch.setattr(Stage, "run", run)
    return found


@pytest.fixture(autouse=True)
def known_alphas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are asked for; elsewhere has none."""
    alphas = networks.alphas_cumprod()
    monkeypatch.setattr(networks, "alphas_cumprod", lambda: alphas)


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """Of a small world, without the ways of its base."""
    made = Training(tmp_path)
    made.world = World(seed=3, persons=40)
    assert len(made.pictures) == made.world.pictures
    monkeypatch.setattr(train_lightning, "go", lambda *_: None)
    return made


@pytest.mark.usefixtures("elsewhere")
def test_every_stage_keeps_to_one_device(
    training: Training, devices: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = training.world.pictures
    training.seen = Seen(torch.zeros(count, 8, 16, 16), torch.zeros(count, 65, 96).half(), 1.0, torch.zeros(65, 96))
    tokens = torch.zeros(64, 77, dtype=torch.int64)
    paths = {"states": torch.zeros(64, 5, 8, 16, 16), "first": tokens, "second": tokens}
    monkeypatch.setattr(train_lightning, "gone", lambda _: paths)
    _ = training.decoder, training.refiner, training.lightning, training.style, training.judge
    stages = ("vae", "clip", "base", "longer", "decoder", "refiner", "lightning", "style", "judge")
    assert devices == {stage: {"meta"} for stage in stages}


@pytest.mark.usefixtures("elsewhere")
def test_ways_of_the_base_keep_to_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_lightning, "_SUBSTEPS", 1)
    unet, hidden, pooled = networks.unet(), torch.zeros(2, 77, networks.CONTEXT), torch.zeros(2, networks.POOLED)
    with torch.no_grad():
        way = train_lightning._path(unet, hidden, pooled, torch.Generator("cpu"))
    assert way.device.type == "meta" and way.shape == (2, 5, 8, 16, 16)


@pytest.mark.usefixtures("elsewhere")
def test_steps_of_muon_keep_to_one_device() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Linear(8, 6))
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)
    Muon([net], 1e-3).step()
    assert all(weight.device.type == "meta" for weight in net.parameters())
