"""Checkpoints that cannot be exported are refused by name, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export import sdxl
from export.__main__ import main
from export.errors import ExportError
from export.source import Folder, open_source
from safetensors.torch import load_file, save_file


def _edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "class_embed_type", "projection"),
        ("unet/config.json", "encoder_hid_dim", 1024),
        ("unet/config.json", "encoder_hid_dim_type", "ip_image_proj"),
        ("unet/config.json", "time_cond_proj_dim", 256),
        ("unet/config.json", "addition_embed_type", "text_image"),
        ("unet/config.json", "addition_embed_type", None),
        ("unet/config.json", "projection_class_embeddings_input_dim", 77),
        ("unet/config.json", "cross_attention_dim", 48),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet/config.json", "dual_cross_attention", True),
        ("unet/config.json", "_class_name", "UNetSpatioTemporalConditionModel"),
        ("vae/config.json", "_class_name", "AutoencoderTiny"),
        ("vae/config.json", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("text_encoder_2/config.json", "num_attention_heads", 7),
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("model_index.json", "text_encoder_2", ["transformers", "T5EncoderModel"]),
        ("model_index.json", "requires_aesthetics_score", True),
    ],
)
def test_unsupported_settings_name_key_and_value(copy: Path, file: str, key: str, value: object) -> None:
    _edit(copy, file, **{key: value})
    with pytest.raises(ExportError) as error:
        sdxl.read(Folder(copy))
    message = str(error.value)
    assert key in message or str(value) in message
    assert Path(file).parent.name in message


def test_pickled_weights_are_refused_with_a_remedy(copy: Path) -> None:
    (copy / "vae/diffusion_pytorch_model.safetensors").rename(copy / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ExportError, match="safe_serialization"):
        Folder(copy).weights("vae")


def test_a_variant_is_found_by_name_and_its_absence_explained(copy: Path) -> None:
    (copy / "vae/diffusion_pytorch_model.safetensors").rename(copy / "vae/diffusion_pytorch_model.fp16.safetensors")
    (found,) = Folder(copy, "fp16").weights("vae")
    assert found.file == "vae/diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(ExportError, match="--variant"):
        Folder(copy).weights("vae")


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard = sorted((copy / "unet").glob("*-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ExportError, match=shard.name):
        Folder(copy).weights("unet")


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    resolve = sdxl.read(Folder(copy)).resolve("vae")
    assert resolve("decoder.conv_in.bias", (16,)) == "decoder.conv_in.bias"
    with pytest.raises(ExportError, match=r"decoder\.conv_in\.bias"):
        resolve("decoder.conv_in.bias", (32,))
    with pytest.raises(ExportError, match="missing"):
        resolve("decoder.conv_in.nothing", (16,))


def test_names_of_old_checkpoints_are_found(copy: Path) -> None:
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    for new, ancient in old.items():
        tensors = {name.replace(new, ancient): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    resolve = sdxl.read(Folder(copy)).resolve("vae")
    base = "decoder.mid_block.attentions.0"
    assert resolve(f"{base}.to_out.0.bias", (16,)) == f"{base}.proj_attn.bias"
    assert resolve(f"{base}.to_q.weight", (16, 16)) == f"{base}.query.weight"


def test_text_encoders_without_the_prefix_are_found(copy: Path) -> None:
    path = copy / "text_encoder_2/model.safetensors"
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    resolve = sdxl.read(Folder(copy)).resolve("text_encoder_2")
    assert resolve("text_model.final_layer_norm.bias", (40,)) == "final_layer_norm.bias"


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 16])
def test_broken_weights_are_named(copy: Path, content: bytes) -> None:
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="not a readable safetensors file"):
        Folder(copy).header("vae")


def test_sources_that_are_no_folder_explain_what_is_wanted(tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ExportError, match="from_single_file"):
        open_source(str(single))
    with pytest.raises(ExportError, match="no such folder"):
        open_source(str(tmp_path / "nothing"))


def test_the_command_exits_with_one_and_writes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(copy, "unet/config.json", class_embed_type="projection")
    out = copy.parent / "out"
    assert main(["model", str(copy), "--name", "x", "--out", str(out)]) == 1
    assert "class_embed_type" in capsys.readouterr().err
    assert not out.exists()
