"""`python -m export demo`, on random weights of the final networks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import random_demo
import yaml
from export import add_adapter, build
from export.__main__ import main
from export.enter_demo import LORAS
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "trained"
    random_demo.write(folder)
    return folder


def test_trained_networks_become_entries_that_name_equal_files_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tracing is tested elsewhere, and takes minutes.
    graphs = {"unet_image": {"plain": b""}, "image_encoder": {"plain": b""}}
    monkeypatch.setattr(build, "all_of", lambda *_: graphs)
    monkeypatch.setattr(build, "one", lambda *_: {"plain": b""})
    monkeypatch.setattr(add_adapter, "_sees_pictures", lambda *_: True)
    (tmp_path / "models").mkdir()
    assert main(["demo", str(trained), "--out", str(tmp_path), "--dialect", "plain"]) == 0
    data = yaml.safe_load((tmp_path / "models.yaml").read_text(encoding="utf-8"))
    base, refiner = data["models"]["demo"], data["models"]["demo-refiner"]
    assert {**base["defaults"]} == {"width": 128, "height": 128, "steps": 25, "guidance": 4.0, "scheduler": "euler"}
    assert base["scheduler"]["prediction_type"] == "v_prediction"
    assert list(base["adapters"]) == ["ip-adapter-plus", "ip-adapter-plus-face"]
    assert [adapter["tokens"] for adapter in base["adapters"].values()] == [16, 16]
    for component in ("text_encoder_2", "vae"):
        assert refiner["weights"][component] == base["weights"][component]
    assert refiner["weights"]["unet"] != base["weights"]["unet"]
    vocabularies = {text["tokenizer"]["vocab"] for model in (base, refiner) for text in model["text"]}
    assert vocabularies == {"models/demo/tokenizer/vocab.json"}
    assert data["loras"].keys() == LORAS.keys()
    assert data["loras"]["demo-lightning"]["distilled_steps"] == 4
    named = [file for model in (base, refiner) for files in model["weights"].values() for file in files]
    assert all((tmp_path / file).is_file() for file in named)


def _spoilt(trained: Path, folder: Path, change: object) -> str:
    shutil.copytree(trained, folder)
    return change(folder)


def _without_a_lora(folder: Path) -> str:
    (folder / "demo-loras" / "chalkboard_lora.safetensors").unlink()
    return "lacks demo-loras/chalkboard_lora.safetensors"


def _in_f32(folder: Path) -> str:
    path = folder / "demo-loras" / "chalkboard_lora.safetensors"
    save_file({name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}, path)
    return "is float32; save it as float16"


def _not_finite(folder: Path) -> str:
    path = folder / "demo" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, path)
    return "not finite"


@pytest.mark.parametrize("change", [_without_a_lora, _in_f32, _not_finite])
def test_what_is_incomplete_or_broken_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object
) -> None:
    said = _spoilt(trained, tmp_path / "spoilt", change)
    out = tmp_path / "out"
    out.mkdir()
    assert main(["demo", str(tmp_path / "spoilt"), "--out", str(out)]) == 1
    assert said in capsys.readouterr().err
    assert not list(out.iterdir())
