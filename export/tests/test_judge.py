"""The judge's export."""

from __future__ import annotations

from pathlib import Path

import judges
import pytest
import torch
from export import judge
from export.__main__ import main
from export.errors import ExportError
from safetensors.torch import load_file, save_file
from torch import nn


def test_a_judge_is_exported_and_its_graph_is_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = judges.weights()
    save_file(own, tmp_path / "own.safetensors")
    assert main(["judge", "judges:Small", str(tmp_path / "own.safetensors"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "logits within" in said and "embedding within" in said
    kept = load_file(tmp_path / "out" / "judge.safetensors")
    assert kept.keys() == own.keys() - {"batch.num_batches_tracked"}
    assert all(torch.equal(kept[name], own[name]) for name in kept)


class _Long(judges.Small):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, embedding = super().forward(pixel_values)
        return logits, 2 * embedding


@pytest.mark.parametrize(
    ("network", "change", "reason"),
    [
        (judges.Small, {"more": torch.zeros(1)}, "differ in more"),
        (judges.Small, {"logits.bias": torch.zeros(3)}, r"shape of logits\.bias"),
        (_Long, {}, "unit length"),
    ],
)
def test_what_is_no_judge_is_refused(tmp_path: Path, network: type[nn.Module], change: dict, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        judge.write(network, {**judges.weights(), **change}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_imported_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "nowhere:Net", "x.safetensors", "--out", "out"]) == 1
    assert "MODULE:CLASS" in capsys.readouterr().err
