"""The LoRA inside a FaceID adapter's file, and the file that it is written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from diffusers import UNet2DConditionModel
from export import adapter_lora, ip_adapter, tiny_adapters
from export.__main__ import main
from export.errors import ExportError
from safetensors.torch import load_file, save_file

ATTENTIONS = [{"name": "mid_block.attentions.0", "width": 24, "layers": 3, "factor": 2}]


def test_the_lora_inside_an_adapter_is_written_as_diffusers_names_it(tmp_path: Path) -> None:
    folder = TINY / "tiny-adapters"
    adapter = load_file(folder / tiny_adapters.FILES["ip-adapter-faceid"])
    net = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "tiny" / "unet"))
    layers = [name.removesuffix(".processor") for name in net.attn_processors]
    inside: dict[str, torch.Tensor] = {}
    for number, name in enumerate(layers):
        for side in ("q", "k", "v", "out"):
            layer = net.get_submodule(f"{name}.to_{side}" + (".0" if side == "out" else ""))
            inside[f"{number}.to_{side}_lora.down.weight"] = torch.randn(2, layer.in_features)
            inside[f"{number}.to_{side}_lora.up.weight"] = torch.randn(layer.out_features, 2)
    path = tmp_path / "faceid.safetensors"
    save_file(adapter | {f"ip_adapter.{name}": tensor for name, tensor in inside.items()}, path)
    root = shutil.copytree(TINY, tmp_path / "root")
    words = ["adapter", str(path), "--for", "tiny", "--name", "mine", "--out", str(root), "--dialect", "plain"]
    out = tmp_path / "lora.safetensors"
    assert main(words) == 1
    assert main([*words, "--lora-out", str(out)]) == 0
    (expected,) = net._load_ip_adapter_loras([{"ip_adapter": inside}]).values()
    written = load_file(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    entry = yaml.safe_load((root / "models.yaml").read_text(encoding="utf-8"))["models"]["tiny"]
    assert entry["adapters"]["mine"] == {
        "kind": "ip-adapter",
        "form": "faceid",
        "origin": str(path),
        "identity": tiny_adapters.IDENTITY,
        "tokens": 4,
    }


def test_what_is_wrong_with_a_lora_inside_is_said(tmp_path: Path) -> None:
    shapes = {f"ip_adapter.{n}.to_q_lora.down.weight": (2, 3) for n in range(9)}
    with pytest.raises(ExportError, match=r"x: holds a LoRA.*--lora-out FILE.*--lora"):
        ip_adapter.recognise("x", shapes)
    with pytest.raises(ExportError, match=r"ip_adapter\.0\.to_k_lora\.down\.weight is missing"):
        adapter_lora.names(shapes, ATTENTIONS)
    there = tmp_path / "there.safetensors"
    there.touch()
    for out, said in [(tmp_path / "a.bin", "does not end in"), (there, "exists")]:
        with pytest.raises(ExportError, match=f"--lora-out .*{said}"):
            adapter_lora.check(out)
