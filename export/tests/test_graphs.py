"""What the graph files promise to the engine that reads them."""

from __future__ import annotations

import onnx
import pytest
from conftest import Exported
from export import sdxl, trace, verify

DIALECTS = ("fused", "cuda", "plain")
FLOAT, FLOAT16, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64


def _ports(values) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def test_every_graph_equals_torch_at_several_shapes_in_all_dialects(exported: Exported) -> None:
    assert exported.status == 0


def test_the_checked_shapes_cover_odd_sizes_batches_and_token_counts() -> None:
    assert {shape["batch"] for shape in verify.SHAPES} == {1, 2, 3}
    assert {shape["tokens"] for shape in verify.SHAPES} == {1, 77, 154}
    assert any(shape["height"] % 2 and shape["width"] % 2 for shape in verify.SHAPES)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_graphs_hold_no_weights(exported: Exported, dialect: str) -> None:
    for component, section in exported.entry["graphs"].items():
        assert len(exported.data(component, dialect)) < 200_000
        for tensor in exported.graph(component, dialect).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                assert {e.key: e.value for e in tensor.external_data} == {"location": section["weights"]}
                assert tensor.data_type in ((FLOAT, FLOAT16) if dialect == "cuda" else (FLOAT,))
            else:
                assert len(tensor.raw_data) <= 1024


@pytest.mark.parametrize("dialect", DIALECTS)
def test_initializers_are_the_checkpoints_tensors(exported: Exported, dialect: str) -> None:
    unet = exported.wanted("unet", dialect) | exported.wanted("kv", dialect)
    assert unet == exported.stored("unet")
    assert not exported.wanted("unet", dialect).keys() & exported.wanted("kv", dialect).keys()
    vae = exported.wanted("vae_decoder", dialect) | exported.wanted("vae_encoder", dialect)
    assert vae == exported.stored("vae")
    assert exported.wanted("text_encoder_2", dialect) == exported.stored("text_encoder_2")


def test_an_encoder_without_projection_drops_what_follows_its_last_used_layer(exports: dict[str, Exported]) -> None:
    wanted, stored = exports["beta"].wanted("text_encoder"), exports["beta"].stored("text_encoder")
    unused = {name for name in stored if ".layers.1." in name or "final_layer_norm" in name}
    assert wanted == {name: shape for name, shape in stored.items() if name not in unused}


def test_cross_attention_projections_are_in_the_kv_graph_only(exported: Exported) -> None:
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in exported.wanted("kv"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ports_are_as_declared_with_free_axes(exported: Exported, dialect: str) -> None:
    entry = exported.entry
    facts, channels = entry["unet"], entry["vae"]["latent_channels"]
    packed = {f"text_kv_{w}": [2 * n, "batch", "tokens", w] for w, n in facts["kv"].items()}
    latents, picture = ["batch", channels, "height", "width"], ["batch", 3, "Height", "Width"]
    unet = {
        "sample": ["batch", facts["in_channels"], "height", "width"],
        "timestep": [1],
        "text_embeds": ["batch", facts["pooled_dim"]],
        "time_ids": ["batch", facts["time_ids"]],
        **packed,
    }
    expected = {
        "kv": ({"encoder_hidden_states": ["batch", "tokens", facts["cross_attention_dim"]]}, packed),
        "unet": (unet, {"out_sample": latents}),
        "vae_decoder": ({"latent_sample": latents}, {"sample": picture}),
        "vae_encoder": ({"sample": picture}, {"mean": latents, "logvar": latents}),
    }
    for component, (inputs, outputs) in expected.items():
        graph = exported.graph(component, dialect).graph
        assert (_ports(graph.input), _ports(graph.output)) == (inputs, outputs)
    text = exported.graph("text_encoder_2", dialect).graph
    assert _ports(text.input) == {"input_ids": ["batch", "tokens"]}
    assert text.input[0].type.tensor_type.elem_type == INT64
    assert list(_ports(text.output)) == ["hidden_states", "text_embeds"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_domains_and_metadata(exported: Exported, dialect: str) -> None:
    for component in exported.entry["graphs"]:
        model = exported.graph(component, dialect)
        trace.check(model)
        onnx.checker.check_model(_inlined(model)) if dialect == "plain" else None
        domains = {node.domain for node in model.graph.node}
        assert domains <= ({""} if dialect == "plain" else {"", "com.microsoft"})
        assert {opset.domain for opset in model.opset_import} == domains
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert metadata == {"tronie.component": component, "tronie.dialect": dialect}
        assert not model.graph.value_info
        assert not model.functions


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker wants external files; zeros of the right size stand in for them."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            count = 1
            for dim in tensor.dims:
                count *= dim
            tensor.raw_data = bytes(4 * count)
    return model


def test_attention_is_one_node_in_fused_and_spelt_out_in_plain(exported: Exported) -> None:
    layers = sum(exported.entry["unet"]["kv"].values())
    fused = [node.op_type for node in exported.graph("unet", "fused").graph.node]
    plain = [node.op_type for node in exported.graph("unet", "plain").graph.node]
    assert fused.count("MultiHeadAttention") == plain.count("Softmax") == 2 * layers
    assert "GroupNormalization" not in fused
    assert "GroupNormalization" in plain
    assert "Gather" not in plain


def test_the_check_fails_when_a_weight_differs(
    exports: dict[str, Exported], checkpoint: sdxl.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verify.load

    def perturbed(files):
        tensors = load(files)
        name = next(name for name in tensors if name.endswith("layers.0.mlp.fc1.weight"))
        tensors[name] = tensors[name] + 0.01
        return tensors

    built = {"text_encoder_2": {"plain": exports["beta"].data("text_encoder_2", "plain")}}
    assert verify.check(checkpoint, built)
    monkeypatch.setattr(verify, "load", perturbed)
    assert not verify.check(checkpoint, built)
