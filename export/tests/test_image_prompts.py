"""Networks of image prompts against diffusers and transformers, and what their graphs promise to the engine."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from conftest import ROOT, TINY, Exported
from export import (
    build,
    initial,
    ip_adapter,
    run,
    sdxl,
    tiny,
    tiny_adapters,
    trace,
    verify,
    verify_adapter,
)
from export.__main__ import main
from export.dialects import DIALECTS
from export.errors import ExportError
from export.ip_adapter import IpAdapter
from export.models import image_encoder
from export.models.ip_adapter import KeysValues, Projection, Tokens, numbered
from export.source import Declared, Folder
from safetensors.torch import save_file

MODELS = {
    name: entry
    for root in (ROOT, TINY)
    for name, entry in yaml.safe_load((root / "models.yaml").read_text(encoding="utf-8"))["models"].items()
}
FORMS = {
    "base": Projection("base", 40, 4, image=12),
    "plus": Projection("plus", 40, 6, image=20, width=24, layers=4, heads=2),
    "full": Projection("full", 40, image=20, width=20),
    "faceid": Projection("faceid", 40, 4, identity=32, width=64),
    "faceid-plusv2": Projection("faceid-plusv2", 40, 4, 20, identity=32, width=64, layers=4, heads=1),
}
ATTENTIONS = [
    {"name": "down_blocks.0.attentions.0", "width": 24, "layers": 1, "factor": 1},
    {"name": "up_blocks.0.attentions.0", "width": 16, "layers": 2, "factor": 2},
    {"name": "mid_block.attentions.0", "width": 24, "layers": 1, "factor": 2},
]


def _file(folder: Path, sizes: Projection) -> Path:
    """An adapter's file with random weights, as published ones are laid out."""
    torch.manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for part in (Tokens(sizes), KeysValues(sizes.context, ATTENTIONS)):
        initial.initialise(part.net)
        tensors.update(part.net.state_dict())
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    return path


def _named(name: str, _shape: tuple[int, ...]) -> str:
    return name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised_and_equals_diffusers_in_all_dialects(form: str, tmp_path: Path) -> None:
    path = _file(tmp_path, FORMS[form])
    origin, file, shapes = ip_adapter.open_file(str(path), None, tmp_path)
    assert (origin, file.reference(tmp_path)) == ("adapter.safetensors", "adapter.safetensors")
    sizes = ip_adapter.recognise(file.file, shapes)
    assert sizes == FORMS[form]
    adapter = IpAdapter("x", origin, file, sizes, ATTENTIONS, None, sizes.tokens or 5)
    built = {graph.component: build.one(graph, list(DIALECTS), _named) for graph in adapter.graphs()}
    assert list(built) == ["x.projection", "x.kv"]
    wanted = {**trace.initializers(built["x.projection"]["fused"]), **trace.initializers(built["x.kv"]["fused"])}
    assert wanted == shapes
    rows = list(verify_adapter.compare(None, adapter, built))
    assert len(rows) == 3 * 3 * (1 + len(numbered(ATTENTIONS)))
    assert all(row.error <= (verify.HALF_TOLERANCE if row.dialect == "cuda" else 1e-5) for row in rows), rows


def test_a_face_and_what_is_seen_of_it_both_move_the_tokens() -> None:
    torch.manual_seed(4)
    net = Tokens(FORMS["faceid-plusv2"]).net
    initial.initialise(net)
    tensors = net.state_dict()
    reference = verify_adapter.verify_pictures.projection("faceid-plusv2", tensors)
    face, seen = torch.randn(1, 32), torch.randn(1, 5, 20)
    with torch.no_grad():
        given = {"id_embeds": face, "hidden_states": seen, "shortcut_scale": torch.ones(1)}
        (told,) = reference(given)
        for other in ({"id_embeds": -face}, {"hidden_states": -seen}, {"shortcut_scale": torch.zeros(1)}):
            assert (reference({**given, **other})[0] - told).abs().max() > 0.1


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("layers", [1, 3])
def test_image_encoders_equal_transformers_in_all_dialects(act: str, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 12, "intermediate_size": 40, "projection_dim": 9, "num_attention_heads": 3}
    config = image_encoder.CLIPVisionConfig(
        **sizes, num_hidden_layers=layers, hidden_act=act, image_size=28, patch_size=8
    )
    net = image_encoder.CLIPVisionModelWithProjection(config)
    initial.initialise(net)
    net.save_pretrained(tmp_path / "seer")
    encoder = ip_adapter.open_encoder("seer", str(tmp_path / "seer"))
    assert encoder.sizes == {"size": 28, "tokens": 10, "width": 12, "projection": 9}
    graph = encoder.graph()
    built = build.one(graph, list(DIALECTS), encoder.resolve())
    tensors = verify.load(encoder.files)
    assert set(trace.initializers(built["fused"])) == set(tensors)
    with torch.no_grad():
        reference = verify_adapter.seen(encoder, tensors)
        rows = list(verify.against(graph, built, tensors, reference, verify_adapter.cases(graph, 1)))
    assert all(row.error <= (verify.HALF_TOLERANCE if row.dialect == "cuda" else 1e-5) for row in rows), rows


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_unet_that_sees_takes_what_the_other_takes_and_pictures(exported: Exported, dialect: str) -> None:
    facts = exported.entry["unet"]
    plain, seeing = (exported.graph(name, dialect).graph for name in ("unet", "unet_image"))
    shapes = {
        port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in seeing.input
    }
    assert list(shapes)[: len(plain.input)] == [port.name for port in plain.input]
    pictures = {f"image_kv_{w}": [2 * n, "batch", "sources", "image_tokens", w] for w, n in facts["kv"].items()}
    factors = sorted({attention["factor"] for attention in facts["attentions"]})
    areas = {f"image_area_{factor}": ["sources", f"area_{factor}"] for factor in factors}
    more = {**pictures, "image_valid": ["sources", "image_tokens"], **areas}
    assert {name: shapes[name] for name in list(shapes)[len(plain.input) :]} == more
    assert exported.wanted("unet_image", dialect) == exported.wanted("unet", dialect)
    masks = [node for node in seeing.node if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.INT32]
    assert len(masks) == 1


def test_attentions_lie_where_the_unet_has_them() -> None:
    base = MODELS["sdxl-base"]["unet"]
    found = [(a["name"], a["width"], a["layers"], a["factor"]) for a in base["attentions"]]
    assert found == [
        *((f"down_blocks.1.attentions.{i}", 640, 2, 2) for i in range(2)),
        *((f"down_blocks.2.attentions.{i}", 1280, 10, 4) for i in range(2)),
        *((f"up_blocks.0.attentions.{i}", 1280, 10, 4) for i in range(3)),
        *((f"up_blocks.1.attentions.{i}", 640, 2, 2) for i in range(3)),
        ("mid_block.attentions.0", 1280, 10, 4),
    ]
    # As the published files number them.
    widths = numbered(base["attentions"])
    assert widths[640] == [1, 3, 5, 7, *range(109, 121, 2)]
    assert widths[1280] == [*range(9, 109, 2), *range(121, 141, 2)]
    assert "attentions" not in MODELS["sdxl-refiner"]["unet"]
    assert "unet_image" not in MODELS["sdxl-refiner"]["graphs"]


def test_the_published_adapters_have_their_published_sizes() -> None:
    entry = MODELS["sdxl-base"]
    encoders, adapters = ip_adapter.declared(run.CONFIGS / "sdxl-base", entry["unet"]["attentions"])
    counts = {}
    for encoder in encoders:
        wanted = _wanted(entry, encoder.component)
        # The last norm and the projection are used too, so that all is.
        counts[encoder.component] = sum(torch.Size(shape).numel() for shape in wanted.values())
    assert counts == {"image_encoder": 632_076_800, "image_encoder_bigg": 1_844_907_264}
    bytes_published = {
        "ip-adapter": 702_570_496,
        "ip-adapter-vit-h": 698_376_192,
        "ip-adapter-plus": 847_497_728,
        "ip-adapter-plus-face": 847_497_728,
    }
    assert [adapter.name for adapter in adapters] == list(entry["adapters"]) == list(bytes_published)
    for adapter in adapters:
        wanted = _wanted(entry, f"{adapter.name}.projection") | _wanted(entry, f"{adapter.name}.kv")
        assert 2 * sum(torch.Size(shape).numel() for shape in wanted.values()) == bytes_published[adapter.name]
        assert entry["adapters"][adapter.name] == adapter.entry()


def _wanted(entry: dict, component: str) -> dict[str, tuple[int, ...]]:
    data = gzip.decompress((ROOT / entry["graphs"][component]["fused"]).read_bytes())
    return dict(trace.initializers(data))


@pytest.mark.parametrize("name", ["tiny", "sdxl-base"])
def test_the_committed_graphs_of_adapters_are_what_the_exporter_makes_today(name: str) -> None:
    entry, root = MODELS[name], TINY if name == "tiny" else ROOT
    if name == "tiny":
        adapter = next(iter(entry["adapters"]))
        place = root / entry["weights"][adapter][0]
        origin, file, shapes = ip_adapter.open_file(str(place), None, root)
        sizes = ip_adapter.recognise(file.file, shapes)
        made = [IpAdapter(adapter, origin, file, sizes, entry["unet"]["attentions"], "image_encoder", 4)]
        encoder = ip_adapter.open_encoder("image_encoder", str(TINY / "tiny-adapters/models/image_encoder"))
        graphs = [encoder.graph(), *made[0].graphs()]
    else:
        _, made = ip_adapter.declared(run.CONFIGS / name, entry["unet"]["attentions"])
        graphs = [
            graph for adapter in made for graph in adapter.graphs() if graph.component.endswith("plus.projection")
        ]
    assert graphs
    for graph in graphs:
        for dialect, data in build.one(graph, list(DIALECTS), _named).items():
            path = root / entry["graphs"][graph.component][dialect]
            assert trace.compress(data) == path.read_bytes(), path


def test_a_model_that_saw_no_pictures_is_given_the_unet_that_does(tmp_path: Path) -> None:
    root = _root(tmp_path, "tiny")
    path = root / "models.yaml"
    entry = yaml.safe_load(path.read_text())["models"]["tiny"]
    assert "unet_image" not in entry["graphs"]
    assert _add(root, "--dialect", "plain", "--verify") == 0
    (plain,) = _models(path)
    assert plain["unet"]["attentions"] == MODELS["tiny"]["unet"]["attentions"]
    assert list(plain["graphs"]["unet_image"]) == ["weights", "plain"]
    committed = TINY / MODELS["tiny"]["graphs"]["unet_image"]["plain"]
    assert (root / plain["graphs"]["unet_image"]["plain"]).read_bytes() == committed.read_bytes()
    # A second dialect joins the first where the files are the same, encoder and UNet alike.
    assert _add(root, "--dialect", "fused") == 0
    (both,) = _models(path)
    for component in ("unet_image", "image_encoder"):
        assert set(both["graphs"][component]) == {"weights", "plain", "fused"}
    assert both["adapters"] == plain["adapters"]


def test_a_model_that_is_exported_again_says_which_adapters_it_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _root(tmp_path, "tiny", adapters=True)
    monkeypatch.setattr(build, "all_of", lambda *_: {})
    assert main(["model", str(TINY / "tiny"), "--name", "tiny", "--out", str(root)]) == 0
    said = capsys.readouterr().out
    assert "left out ip-adapter, ip-adapter-plus, ip-adapter-plus-face, ip-adapter-faceid" in said
    assert "python -m export adapter" in said


def _root(tmp_path: Path, model: str, *, adapters: bool = False) -> Path:
    """A catalogue of one committed model, without what image prompts need unless told."""
    root = shutil.copytree(TINY, tmp_path / "root", ignore=shutil.ignore_patterns("graphs"))
    entry = yaml.safe_load((TINY / "models.yaml").read_text(encoding="utf-8"))["models"][model]
    if not adapters:
        del entry["adapters"], entry["image_encoders"], entry["unet"]["attentions"]
        own = [key for key in entry["weights"] if key.startswith(("ip-", "image_"))]
        entry["weights"] = {key: files for key, files in entry["weights"].items() if key not in own}
        graphs = entry["graphs"].items()
        entry["graphs"] = {key: at for key, at in graphs if at["weights"] not in own and key != "unet_image"}
    content = yaml.safe_dump({"format": 1, "models": {model: entry}}, sort_keys=False)
    (root / "models.yaml").write_text(content, encoding="utf-8")
    return root


def _add(root: Path, *more: str) -> int:
    folder = root / "tiny-adapters"
    source = folder / tiny_adapters.FILES["ip-adapter"]
    words = ["adapter", str(source), "--image-encoder", str(folder / tiny_adapters.ENCODER), "--for", "tiny"]
    return main([*words, "--name", "ip-adapter", "--out", str(root), *more])


def _models(path: Path) -> list[dict]:
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["models"].values())


@pytest.mark.parametrize(("context", "family"), [(768, "Stable Diffusion 1.5"), (1024, "Stable Diffusion 2")])
def test_adapters_of_other_families_are_named(context: int, family: str) -> None:
    unet = {"cross_attention_dim": 2048, "attentions": ATTENTIONS}
    sizes = Projection("base", context, 4, image=1024)
    with pytest.raises(ExportError, match=rf"{context} \({family}\).*UNet of sdxl takes 2048"):
        ip_adapter.check_model("x.safetensors", {}, sizes, "sdxl", unet)


def test_encoders_are_refused_by_the_output_that_the_adapter_reads() -> None:
    encoders, _ = ip_adapter.declared(run.CONFIGS / "sdxl-base", ATTENTIONS)
    h, bigg = encoders
    for sizes, wrong, said in [
        (
            Projection("base", 2048, 4, image=1280),
            h,
            r"image_embeds of width 1280 \(OpenCLIP ViT-bigG/14's\).*have 1024",
        ),
        (
            Projection("base", 2048, 4, image=1024),
            bigg,
            r"image_embeds of width 1024 \(OpenCLIP ViT-H/14's\).*have 1280",
        ),
        (Projection("plus", 2048, 16, image=1280), bigg, r"hidden_states of width 1280 \(OpenCLIP ViT-H/14's\).*1664"),
        (Projection("faceid", 2048, 4, identity=512), h, "sees no pictures; leave --image-encoder out"),
        (Projection("plus", 2048, 16, image=1280), None, "needs --image-encoder"),
    ]:
        with pytest.raises(ExportError, match=said):
            ip_adapter.check_encoder("x", sizes, wrong)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "siglip_vision_model"}, "model_type"),
        ({"architectures": ["CLIPVisionModel"]}, "architectures"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_channels": 4}, "num_channels"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"image_size": 8, "patch_size": 14}, "image_size"),
    ],
)
def test_encoders_of_other_kinds_are_refused(changed: dict, said: str) -> None:
    config = Declared(run.CONFIGS / "sdxl-base" / "adapters").json("models/image_encoder/config.json")
    with pytest.raises(ExportError, match=f"image_encoder/config.json: `{said}`"):
        image_encoder.check("image_encoder", {**config, **changed})


def test_sizes_of_another_type_are_refused_without_a_traceback() -> None:
    with pytest.raises(ExportError, match=r"seer/config\.json: is no CLIPVisionModelWithProjection's.*image_size"):
        image_encoder.check("seer", {"image_size": "large"})


def test_files_that_are_no_single_adapter_say_what_to_name(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ExportError, match=r"a\.safetensors, b\.safetensors; name one of them"):
        ip_adapter.open_file(str(tmp_path), None, tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "ip-adapter.bin").touch()
    with pytest.raises(ExportError, match=r"ip-adapter\.bin: pickled weights.*weights_only=True"):
        ip_adapter.open_file(str(pickled), None, tmp_path)
    with pytest.raises(ExportError, match="leave it out"):
        ip_adapter.open_file(str(_file(tmp_path, FORMS["base"])), "main", tmp_path)
    with pytest.raises(ExportError, match="of no known form"):
        ip_adapter.recognise("x", {"image_proj.other.weight": (3, 3)})


def test_a_pickled_adapter_converts_as_the_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {**Tokens(FORMS["base"]).net.state_dict(), **KeysValues(40, ATTENTIONS).net.state_dict()}
    nested: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in flat.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor
    torch.save(nested, tmp_path / "in.bin")
    with pytest.raises(ExportError) as error:
        ip_adapter.open_file("in.bin", None, tmp_path)
    code = str(error.value).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(code.replace("'IN'", "'in.bin'").replace("'OUT.safetensors'", "'out.safetensors'"), {})
    _, file, shapes = ip_adapter.open_file("out.safetensors", None, tmp_path)
    assert ip_adapter.recognise(file.file, shapes) == FORMS["base"]


def test_an_encoder_whose_weights_are_others_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY / "tiny-adapters/models/image_encoder", tmp_path / "seer"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 12', '"projection_dim": 13'))
    encoder = ip_adapter.open_encoder("seer", str(folder))
    with pytest.raises(ExportError, match=r"visual_projection\.weight has shape \[12, 8\].*\[13, 8\]"):
        build.one(encoder.graph(), ["plain"], encoder.resolve())


def test_the_tiny_adapters_are_those_that_tiny_writes(tmp_path: Path) -> None:
    tiny.write("tiny-adapters", tmp_path / "adapters")
    committed = TINY / "tiny-adapters"
    names = {path.relative_to(committed) for path in committed.rglob("*.safetensors")}
    assert names == {path.relative_to(tmp_path / "adapters") for path in (tmp_path / "adapters").rglob("*.safetensors")}
    assert all((committed / name).read_bytes() == (tmp_path / "adapters" / name).read_bytes() for name in names)
    assert sum(path.stat().st_size for path in committed.rglob("*") if path.is_file()) < 320 << 10


def test_a_seeing_unet_belongs_to_base_models(checkpoints: dict[str, Path]) -> None:
    refiner = sdxl.read(Folder(checkpoints["alpha-refiner"]))
    assert not refiner.sees_pictures
    assert "unet_image" not in [graph.component for graph in refiner.graphs()]
    assert sdxl.read(Folder(checkpoints["gamma"])).sees_pictures
