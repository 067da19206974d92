"""Whole models in one file: what diffusers makes of them is what they were made of, and tronie paints the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOTH, ROOT, TRONIE, Exported, built
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reference
from export import original_layout
from export.__main__ import main
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FIRST = "conditioner.embedders.0.transformer."


def by_diffusers(whole: dict[str, Tensor], configs: Path, wanted: dict) -> dict[str, dict[str, Tensor]]:
    """The components of a file, turned into diffusers' layout by diffusers."""

    def config(component: str) -> dict:
        return json.loads((configs / component / "config.json").read_text(encoding="utf-8"))

    found = {
        "unet": reference.convert_ldm_unet_checkpoint(dict(whole), config("unet")),
        "vae": reference.convert_ldm_vae_checkpoint(dict(whole), config("vae")),
    }
    second = "conditioner.embedders.0.model."
    if "text_encoder" in wanted:
        found["text_encoder"] = {
            name.removeprefix(FIRST): tensor for name, tensor in whole.items() if name.startswith(FIRST)
        }
        second = "conditioner.embedders.1.model."
    # Of the model, the conversion asks for the width, and only where there is no projection.
    found["text_encoder_2"] = reference.convert_open_clip_checkpoint(None, dict(whole), prefix=second)
    return found


def of_hub(components: dict) -> dict:
    """CLIP's names of transformers 4, which the original layout has."""
    text = components.get("text_encoder", {})
    names = {original_layout.hub_text_name(name): tensor for name, tensor in text.items()}
    return {**components, **({"text_encoder": names} if names else {})}


@pytest.mark.parametrize("name", [*BOTH, "alpha-refiner"])
def test_diffusers_makes_the_checkpoint_of_it_again(checkpoints: dict[str, Path], name: str) -> None:
    folder = checkpoints[name]
    components = of_hub(original_layout.read(folder))
    found = by_diffusers(original_layout.whole(components), folder, components)
    assert found.keys() == components.keys()
    for component, tensors in components.items():
        assert found[component].keys() == tensors.keys(), component
        for tensor, values in tensors.items():
            assert torch.equal(found[component][tensor], values), f"{component}: {tensor}"


def full_size(config: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a published model without their values."""
    folder = ROOT / "export/configs" / config

    def read(component: str) -> dict:
        return json.loads((folder / component / "config.json").read_text(encoding="utf-8"))

    components = {}
    with torch.device("meta"):
        for component, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            components[component] = kind.from_config(read(component)).state_dict()
        for component, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if (folder / component).is_dir():
                components[component] = kind(CLIPTextConfig(**read(component))).state_dict()
    return of_hub(components)


@pytest.mark.parametrize("config", ["sdxl-base", "sdxl-refiner"])
def test_names_and_shapes_are_diffusers_at_full_size(config: str) -> None:
    components = full_size(config)
    found = by_diffusers(original_layout.whole(components), ROOT / "export/configs" / config, components)
    for component, tensors in components.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert {name: tuple(tensor.shape) for name, tensor in found[component].items()} == shapes, component


@pytest.mark.parametrize("config", ["sdxl-base", "sdxl-refiner"])
@built
def test_tronie_finds_every_tensor_at_full_size(config: str, tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    sparse(file, original_layout.whole(full_size(config)))
    run = tronie("schedulers", "--models", "built-in", "--model", file)
    assert run.returncode == 0, run.stderr


def sparse(file: Path, tensors: dict[str, Tensor]) -> None:
    """A file of f16 whose values are a hole, which takes no space."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def tronie(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TRONIE, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", BOTH)
@built
def test_tronie_paints_the_same_from_both_layouts(exports: dict[str, Exported], tmp_path: Path, name: str) -> None:
    exported, file = exports[name], tmp_path / "whole.safetensors"
    assert main(["original", str(exported.folder), "--out", str(file)]) == 0
    pictures = []
    for model in (name, file):
        picture = tmp_path / f"{len(pictures)}.png"
        few = ["--steps", 3, "--seed", 4, "--memory", "low", "--output", picture]
        run = tronie("generate", "a cat", "--models", exported.out / "models.yaml", "--model", model, *few)
        assert run.returncode == 0, run.stderr
        pictures.append(np.asarray(Image.open(picture)))
    assert np.array_equal(*pictures)


def test_what_cannot_be_written_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = checkpoints["gamma"], tmp_path / "whole.safetensors"

    def refused(*words: object) -> str:
        assert main(["original", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "no model_index.json" in refused(tmp_path, "--out", file)
    assert "allowed: f32, f16, bf16" in refused(folder, "--out", file, "--dtype", "fp8")
    assert not file.exists()
    file.write_bytes(b"")
    assert "exists" in refused(folder, "--out", file)
