"""Random checkpoints: what the hub's files look like, at full size by their headers and small by their contents."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import tracemalloc
from collections import namedtuple
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
import yaml
from export import initial, random_checkpoint, sdxl, streaming, tokens, trace
from export.__main__ import main
from export.errors import ExportError
from export.random_checkpoint import Settings
from export.source import Folder, read_header
from export.streaming import Normal
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("never_at_full_size")

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "export" / "configs"
NAMES = ("sdxl-base", "sdxl-refiner")
_TEXT = {"num_hidden_layers": 3, "vocab_size": 600}
_VAE = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 128}
_UNET = {"sample_size": 16, "norm_num_groups": 4, "addition_time_embed_dim": 8, "transformer_layers_per_block": 1}
# What makes the shipped configs small.
SMALLER = {
    "sdxl-base": {
        "text_encoder": {**_TEXT, "hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2},
        "text_encoder_2": {**_TEXT, "hidden_size": 24, "intermediate_size": 60, "projection_dim": 20},
        "unet": {
            **_UNET,
            "block_out_channels": [8, 16, 24],
            "attention_head_dim": [1, 2, 3],
            "cross_attention_dim": 40,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
        "vae": _VAE,
    },
    "sdxl-refiner": {
        "text_encoder_2": {**_TEXT, "hidden_size": 32, "intermediate_size": 60, "projection_dim": 28},
        "unet": {
            **_UNET,
            "block_out_channels": [8, 16, 16, 24],
            "attention_head_dim": [2, 4, 4, 6],
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 28 + 5 * 8,
        },
        "vae": _VAE,
    },
}


@pytest.fixture(params=NAMES)
def configs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The shipped configs of one model, with fewer and narrower layers."""
    folder = Path(shutil.copytree(CONFIGS / request.param, tmp_path / "configs" / request.param))
    for component, smaller in SMALLER[request.param].items():
        path = folder / component / "config.json"
        heads = {"num_attention_heads": 4} if component == "text_encoder_2" else {}
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **heads, **smaller}))
    return folder


def _networks(folder: Path) -> dict[str, type]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    libraries = {"diffusers": diffusers, "transformers": transformers}
    return {
        name: getattr(libraries[index[name][0]], index[name][1])
        for name in ("text_encoder", "text_encoder_2", "unet", "vae")
        if index.get(name, [None])[0]
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shard", [None, "25KB"])
def test_the_libraries_load_a_checkpoint_and_would_save_the_same_files(
    configs: Path, tmp_path: Path, dtype: str, shard: str | None
) -> None:
    out = tmp_path / "out"
    random_checkpoint.write(configs, out, Settings(dtype, 3, shard))
    variant, kind = {"f32": (None, torch.float32), "f16": ("fp16", torch.float16)}[dtype]
    for component, network in _networks(out).items():
        net, info = network.from_pretrained(
            out / component, variant=variant, dtype=kind, use_safetensors=True, output_loading_info=True
        )
        assert not any(info.values()), info
        saved = tmp_path / "saved" / component
        net.save_pretrained(saved, variant=variant, **({"max_shard_size": shard} if shard else {}))
        ours, theirs = _tensors(out / component), _tensors(saved)
        assert sorted(ours) == sorted(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for path in (out / component).glob("*.safetensors"):
            length = int.from_bytes(path.read_bytes()[:8], "little")
            assert length % 8 == 0
        # With shards, transformers sorts the names before it cuts; its index says where each tensor is.
        folders = (out / component, saved)
        if shard is None or component in ("unet", "vae"):
            headers, other = ({path.name: read_header(path) for path in f.glob("*.safetensors")} for f in folders)
            assert headers == other
        indices, other = (sorted(path.name for path in f.glob("*.index*")) for f in folders)
        assert indices == other
        assert len(indices) == (shard is not None)


def test_the_exporter_finds_the_variant_and_every_tensor(configs: Path, tmp_path: Path) -> None:
    random_checkpoint.write(configs, tmp_path / "out", Settings("f16", shard="25KB"))
    checkpoint = sdxl.read(Folder(tmp_path / "out", "fp16"))
    files = [file for files in checkpoint.weights().values() for file in files]
    assert len(files) > 4
    assert all(".fp16-00" in file.file for file in files if "unet" in file.file)
    with pytest.raises(ExportError, match="--variant"):
        sdxl.read(Folder(tmp_path / "out")).weights()


def test_a_pipeline_paints_with_it_neither_flat_nor_saturated(configs: Path, tmp_path: Path) -> None:
    random_checkpoint.write(configs, tmp_path / "out", Settings(seed=1))
    index = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    start = {"image": torch.rand(1, 3, 64, 64), "strength": 0.7} if "Img2Img" in index["_class_name"] else {}
    picture = pipeline("a cat", num_inference_steps=3, output_type="np", **start).images[0]
    assert np.isfinite(picture).all()
    assert picture.std() > 0.02
    assert ((picture == 0) | (picture == 1)).mean() < 0.05


@pytest.mark.parametrize(("name", "dtype", "variant"), [("sdxl-base", "f16", "fp16"), ("sdxl-refiner", "f32", None)])
def test_at_full_size_it_fits_the_committed_graphs_and_their_entry(
    name: str, dtype: str, variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_the_header(path: Path, tensors: list[Normal], dtype: str, seed: str) -> None:
        assert seed == f"5/{path.parent.name}"
        path.write_bytes(streaming.header(tensors, dtype))

    monkeypatch.setattr(streaming, "write", only_the_header)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 50))
    command = ["random", "--config", name, "--out", tmp_path / name, "--dtype", dtype, "--seed", "5"]
    assert main([*map(str, command), "--catalogue", str(tmp_path / "models.yaml")]) == 0
    checkpoint = sdxl.read(Folder(tmp_path / name, variant))
    made, committed = (
        yaml.safe_load((folder / "models.yaml").read_text(encoding="utf-8"))["models"][name]
        for folder in (tmp_path, ROOT)
    )
    for component in made["graphs"]:
        section = committed["graphs"][component]
        for dialect in ("fused", "plain"):
            assert (tmp_path / made["graphs"][component][dialect]).samefile(ROOT / section[dialect])
        resolve = checkpoint.resolve(section["weights"])
        for tensor, shape in trace.initializers(gzip.decompress((ROOT / section["fused"]).read_bytes())).items():
            assert resolve(tensor, shape) == tensor
    for files in made["weights"].values():
        assert all((tmp_path / file).is_file() for file in files)
    for text, other in zip(made["text"], committed["text"], strict=True):
        assert (tmp_path / text["tokenizer"].pop("vocab")).is_file()
        assert (tmp_path / text["tokenizer"].pop("merges")).is_file()
        del other["tokenizer"]["vocab"], other["tokenizer"]["merges"]
    # Adapters are written only when they are asked for.
    for key in ("licence", "origin", "weights", "graphs", "image_encoders", "adapters"):
        made.pop(key, None)
        committed.pop(key, None)
    assert made == committed


def test_the_numbers_follow_the_seed_and_nothing_else(configs: Path, tmp_path: Path) -> None:
    runs = {"a": Settings(seed=7), "b": Settings(seed=7), "c": Settings(seed=8), "d": Settings("f16", 7, "25KB")}
    for folder, settings in runs.items():
        random_checkpoint.write(configs, tmp_path / folder, settings)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    for component in ("unet", "vae", "text_encoder_2"):
        a, c, d = (_tensors(tmp_path / folder / component) for folder in "acd")
        assert all(torch.equal(a[name].half(), d[name]) for name in a)
        assert not any(torch.equal(a[name], c[name]) for name in a)
    unet, vae = (_tensors(tmp_path / "a" / component) for component in ("unet", "vae"))
    assert not any(torch.equal(unet["conv_in.bias"], tensor) for tensor in vae.values())


def test_values_have_the_distribution_of_their_layer(tmp_path: Path) -> None:
    count = 3 * streaming.CHUNK + 5
    streaming.write(tmp_path / "x", [Normal("b", (count,), 1.0, 0.1), Normal("a", (5, 5), 0.0, 2.0)], "f32", "0")
    tensors = load_file(tmp_path / "x")
    assert tensors["a"].shape == (5, 5)
    assert tensors["b"].mean().item() == pytest.approx(1.0, abs=1e-3)
    assert tensors["b"].std().item() == pytest.approx(0.1, abs=1e-3)
    chunks = tensors["b"][: 3 * streaming.CHUNK].reshape(3, -1)
    assert torch.corrcoef(chunks).fill_diagonal_(0).abs().max() < 5e-3


def test_memory_is_bounded_by_the_chunks_and_not_by_the_tensor(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        streaming.write(tmp_path / "x", [Normal("a", (24, 1 << 20), 0.0, 1.0)], "f16", "0")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "x").stat().st_size > 48 << 20
    assert peak < 40 << 20


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def _terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("fault", "error"), [(_fail, ExportError), (_terminate, SystemExit)])
def test_a_run_that_fails_or_is_stopped_leaves_nothing(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: object, error: type[BaseException]
) -> None:
    whole = streaming.write

    def until_the_vae(path: Path, *rest: object) -> None:
        whole(path, *rest)
        if path.parent.name == "vae":
            fault()

    monkeypatch.setattr(streaming, "write", until_the_vae)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        random_checkpoint.write(configs, tmp_path / "new" / "out", Settings())
    assert list((tmp_path / "new").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_some_components_come_with_all_configs(configs: Path, tmp_path: Path) -> None:
    random_checkpoint.write(configs, tmp_path / "out", Settings(components=("vae",)))
    assert [path.parent.name for path in (tmp_path / "out").glob("*/*.safetensors")] == ["vae"]
    assert (tmp_path / "out" / "unet" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer_2" / "vocab.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "sd15"], "sdxl-base, sdxl-refiner"),
        (["--config", "sdxl-base", "--dtype", "bf16"], "f32, f16"),
        (["--config", "sdxl-base", "--seed", "-1"], "0 or more"),
        (["--config", "sdxl-base", "--shard", "5GiB"], "5GB"),
        (["--config", "sdxl-base", "--shard", "0GB"], "5GB"),
        (["--config", "sdxl-base", "--shard=-5GB"], "5GB"),
        (["--config", "sdxl-refiner", "--components", "unet,text_encoder"], "text_encoder_2, unet, vae"),
        (["--config", "sdxl-base", "--components", "unet", "--catalogue", "models.yaml"], "--components"),
        (["--config", "sdxl-base", "--catalogue", "README.md"], "README.md"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("words\n", encoding="utf-8")
    arguments = [str(tmp_path / word) if word == "README.md" else word for word in arguments]
    assert main(["random", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_full_folder_and_a_full_disk_are_refused(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="not empty"):
        random_checkpoint.write(configs, configs, Settings())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(ExportError, match="GB are free"):
        random_checkpoint.write(configs, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_has_clips_size_and_special_ids(name: str) -> None:
    facts = json.loads((CONFIGS / name / "hub.json").read_text(encoding="utf-8"))
    ids = tokens.vocabulary(tokens.merges_for(49408))
    assert len(ids) == 49408
    for special in facts["token_ids"].values():
        assert {token: ids[token] for token in special} == special


def test_the_big_vocabulary_reads_words_and_bytes(tmp_path: Path) -> None:
    tokens.save(tmp_path, tokens.merges_for(49408), tokens.END, 77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a photo of a cat", "qzxj kvw", "窓の上の猫 🙂"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer("a photo of a cat").input_ids) == 7
    with pytest.raises(ExportError, match="vocab_size"):
        tokens.merges_for(100)
    with pytest.raises(ExportError, match="vocab_size"):
        tokens.merges_for(1_000_000)


def test_a_layer_of_unknown_kind_has_no_law() -> None:
    assert initial.law(torch.nn.Sequential(torch.nn.PReLU()), "0.weight") is None
