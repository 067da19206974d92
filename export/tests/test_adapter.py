"""`python -m export adapter`: what it adds to an entry, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from export import catalogue
from export.__main__ import main
from safetensors.torch import load_file, save_file

ADAPTERS = Path("tiny-adapters")
ENCODER = ADAPTERS / "models" / "image_encoder"
PLUS = TINY / ADAPTERS / "sdxl_models" / "ip-adapter-plus_sdxl_vit-h.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's catalogue, checkpoint and graphs, to add to."""
    root = shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "root")
    catalogue.put(root / "models.yaml", "fast", {"like": "tiny"})
    return root


def _add(root: Path, source: Path, name: str, *more: str, model: str = "tiny", encoder: Path | None = ENCODER) -> int:
    words = ["adapter", str(root / source), "--for", model, "--name", name, "--out", str(root), *more]
    return main([*words, "--image-encoder", str(root / encoder)] if encoder else words)


@pytest.mark.parametrize("name", ["ip-adapter", "ip-adapter-plus"])
def test_an_adapter_enters_the_entry_and_its_graphs_are_torchs(root: Path, name: str) -> None:
    source = ADAPTERS / "sdxl_models" / f"{name}_sdxl_vit-h.safetensors"
    assert _add(root, source, f"my-{name}", "--verify", "--dialect", "fused") == 0
    entry = yaml.safe_load((root / "models.yaml").read_text())["models"]["tiny"]
    committed = entry["adapters"][name]
    mine = entry["adapters"][f"my-{name}"]
    assert {**mine, "origin": None, "image_encoder": None} == {**committed, "origin": None, "image_encoder": None}
    for part in ("projection", "kv"):
        assert (root / entry["graphs"][f"my-{name}.{part}"]["fused"]).is_file()


def test_a_variant_takes_its_bases_adapters(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (root / "models.yaml").read_bytes()
    assert _add(root, PLUS, "mine", model="fast") == 1
    assert "is a variant of tiny; add the adapter to that" in capsys.readouterr().err
    assert (root / "models.yaml").read_bytes() == before


def _changed(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    tensors = {**load_file(PLUS), **change}
    path = folder / "changed.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"ip_adapter.1.to_k_ip.weight": None}, ["ip_adapter.1.to_k_ip.weight", "is missing"]),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(320, 40)}, ["[320, 40]", "tiny", "made for this model"]),
        ({"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 16)}, ["LoRA", "--lora-out FILE"]),
        ({"image_proj.extra": torch.zeros(2)}, ["image_proj.extra", "is unknown"]),
        ({"something": torch.zeros(2)}, ["something", "unknown", "image_proj.*"]),
        ({"image_proj.norm_out.weight": torch.ones(768)}, ["norm_out"]),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, parts: list[str]
) -> None:
    before = (root / "models.yaml").read_bytes()
    assert _add(root, _changed(tmp_path, change), "other") == 1
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert (root / "models.yaml").read_bytes() == before


def test_wrong_models_encoders_and_files_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "ip-adapter.bin"
    pickled.write_bytes(b"x")
    wide = tmp_path / "encoder"
    shutil.copytree(TINY / ENCODER, wide)
    config = (wide / "config.json").read_text().replace('"hidden_size": 8', '"hidden_size": 16')
    (wide / "config.json").write_text(config)
    for source, model, encoder, parts in [
        (PLUS, "nobody", ENCODER, ["--for nobody", "it has: tiny"]),
        (PLUS, "tiny-refiner", ENCODER, ["refiner", "base models"]),
        (PLUS, "tiny", None, ["needs --image-encoder"]),
        (PLUS, "tiny", tmp_path / "none", ["no such folder"]),
        (PLUS, "tiny", wide, ["hidden_states of width 8", "have 16"]),
        (pickled, "tiny", ENCODER, ["ip-adapter.bin", "safetensors"]),
        (tmp_path / "no.safetensors", "tiny", ENCODER, ["no such file"]),
    ]:
        words = ["--image-encoder-name", "seer"] if encoder else []
        assert _add(root, source, "other", *words, model=model, encoder=encoder) == 1
        said = capsys.readouterr().err
        assert all(part in said for part in parts), said
