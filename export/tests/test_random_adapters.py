"""Random adapters of the published kinds: their layout, at full size by their headers and small by their contents."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import namedtuple
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from export import ip_adapter, random_adapters, random_checkpoint, sdxl, streaming, trace
from export.__main__ import main
from export.errors import ExportError
from export.random_checkpoint import Settings
from export.source import Folder, read_header
from export.streaming import Normal
from PIL import Image
from safetensors.torch import load_file
from test_random import CONFIGS, ROOT, SMALLER

pytestmark = pytest.mark.usefixtures("never_at_full_size")

ADAPTERS = ("ip-adapter-plus", "ip-adapter-plus-face")
_VISION = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3}
_VISION |= {"image_size": 28, "patch_size": 7, "projection_dim": 20}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The shipped configs of the base model and its adapters, with fewer and narrower layers."""
    folder = Path(shutil.copytree(CONFIGS / "sdxl-base", tmp_path / "configs" / "sdxl-base"))
    described = folder / random_adapters.FOLDER
    paths = {folder / component / "config.json": small for component, small in SMALLER["sdxl-base"].items()}
    paths |= dict.fromkeys(described.glob("*/image_encoder/config.json"), _VISION)
    for path, smaller in paths.items():
        heads = {"num_attention_heads": 4} if path.parent.name == "text_encoder_2" else {}
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **heads, **smaller}))
    facts = json.loads((described / "hub.json").read_text(encoding="utf-8"))
    for about in facts["adapters"].values():
        plus = about["projection"]["form"] == "plus"
        sizes = {"image": 24, "width": 32, "heads": 2} if plus else {"image": 20}
        about["projection"].update(context=40, **sizes)
    (described / "hub.json").write_text(json.dumps(facts))
    return folder


def test_diffusers_paints_with_them_and_sees_the_pictures(configs: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out" / random_adapters.FOLDER
    random_checkpoint.write(configs, out, Settings(seed=1, adapters=("ip-adapter-vit-h", *ADAPTERS)))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    names = sorted(path.name for path in (folder / "sdxl_models").iterdir())
    assert len(names) == 3
    pipeline.load_ip_adapter(str(folder), "sdxl_models", names, image_encoder_folder="models/image_encoder")
    pipeline.set_ip_adapter_scale([0.5] * 3)
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    made = [
        pipeline(
            "a cat",
            num_inference_steps=2,
            output_type="latent",
            ip_adapter_image=[Image.fromarray(picture)] * 3,
            generator=torch.Generator().manual_seed(1),
        ).images
        for picture in noise
    ]
    assert all(torch.isfinite(latents).all() for latents in made)
    assert (made[0] - made[1]).abs().max() > 1e-2 * made[0].abs().max()


def test_each_has_numbers_of_its_own_in_the_dtype_asked_for(configs: Path, tmp_path: Path) -> None:
    only = {"components": ("image_encoder", *ADAPTERS), "adapters": ADAPTERS}
    for name, settings in {"a": Settings(seed=2, **only), "b": Settings("f16", 2, **only)}.items():
        random_checkpoint.write(configs, tmp_path / name, settings)
        written = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*.safetensors")}
        assert written == {
            "adapters/models/image_encoder/model.safetensors",
            "adapters/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
            "adapters/sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
        }
        for file in written:
            wide, found = load_file(tmp_path / "a" / file), load_file(tmp_path / name / file)
            assert all(torch.equal(wide[key].to(found[key].dtype), found[key]) for key in wide | found)
            assert {tensor.dtype for tensor in found.values()} == {{"a": torch.float32, "b": torch.float16}[name]}
    plus, face = (load_file(path) for path in sorted((tmp_path / "a" / "adapters" / "sdxl_models").iterdir()))
    assert plus.keys() == face.keys()
    assert not any(torch.equal(plus[key], face[key]) for key in plus)


def test_at_full_size_they_fit_the_committed_graphs_and_their_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_the_header(path: Path, tensors: list[Normal], dtype: str, seed: str) -> None:
        assert seed.startswith("5/")
        path.write_bytes(streaming.header(tensors, dtype))

    monkeypatch.setattr(streaming, "write", only_the_header)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 50))
    out = tmp_path / "x"
    command = ["random", "--config", "sdxl-base", "--out", out, "--dtype", "f16", "--seed", "5", "--adapters"]
    assert main([*map(str, command), ",".join(ADAPTERS), "--catalogue", str(tmp_path / "models.yaml")]) == 0
    made, committed = (
        yaml.safe_load((folder / "models.yaml").read_text(encoding="utf-8"))["models"]["sdxl-base"]
        for folder in (tmp_path, ROOT)
    )
    unet = sdxl.read(Folder(out, "fp16")).unet
    for name in ("image_encoder", *ADAPTERS):
        (file,) = made["weights"][name]
        shapes = read_header(tmp_path / file)
        if name in ADAPTERS:
            sizes = ip_adapter.recognise(file, shapes)
            ip_adapter.check_model(file, shapes, sizes, "sdxl-base", unet)
            # The published file's size, without its header.
            assert sum(2 * torch.Size(shape).numel() for shape in shapes.values()) == 847_497_728
            assert made["adapters"][name].pop("origin") == "x/adapters"
            assert committed["adapters"][name].pop("origin") == "h94/IP-Adapter"
            assert made["adapters"][name] == committed["adapters"][name]
        graphs = {key for key in made["graphs"] if made["graphs"][key]["weights"] == name}
        assert graphs == ({f"{name}.projection", f"{name}.kv"} if name in ADAPTERS else {name})
        for component in graphs:
            section = committed["graphs"][component]
            assert (tmp_path / made["graphs"][component]["fused"]).samefile(ROOT / section["fused"])
            for tensor, shape in trace.initializers(gzip.decompress((ROOT / section["fused"]).read_bytes())).items():
                assert shapes[tensor] == shape
    assert made["image_encoders"] == {"image_encoder": committed["image_encoders"]["image_encoder"]}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("sdxl-base", ["--adapters", "ip-adapter-plus,x"], "ip-adapter-plus, ip-adapter-plus-face"),
        ("sdxl-refiner", ["--adapters", "ip-adapter-plus"], "sdxl-refiner has no adapters"),
        ("sdxl-base", ["--adapters", "ip-adapter-plus", "--components", "x"], "vae, image_encoder, ip-adapter-plus"),
        ("sdxl-base", ["--components", "ip-adapter-plus"], "text_encoder_2, unet, vae"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(
    config: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["random", "--config", config, *arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_their_size_counts_when_the_disk_is_full(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Settings(components=("ip-adapter-plus",), adapters=("ip-adapter-plus",))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(ExportError, match="GB are free"):
        random_checkpoint.write(configs, tmp_path / "out", only)
    assert not (tmp_path / "out").exists()
