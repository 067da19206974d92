"""The `cuda` dialect against what ONNX Runtime and its CUDA kernels accept, as far as a CPU shows."""

from __future__ import annotations

import gzip

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TINY, Exported
from export import composite as op
from export import emulate, graphs, trace, verify
from export.dialects import cuda
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from torch import nn

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
SCHEMAS = {schema.name: schema for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}


def _models(exported: Exported) -> list[onnx.ModelProto]:
    return [exported.graph(component, "cuda") for component in exported.entry["graphs"]]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _attributes(node: onnx.NodeProto) -> dict:
    return {attr.name: onnx.helper.get_attribute_value(attr) for attr in node.attribute}


def test_contrib_nodes_keep_to_their_schemas(exported: Exported) -> None:
    nodes = [node for model in _models(exported) for node in model.graph.node if node.domain == "com.microsoft"]
    assert {node.op_type for node in nodes} >= {"GroupNorm", "SkipGroupNorm", "SkipLayerNormalization"}
    for node in nodes:
        schema = SCHEMAS[node.op_type]
        required = [str(parameter.option).endswith("Single") for parameter in schema.inputs]
        assert len(node.input) <= len(schema.inputs)
        assert len(node.output) <= len(schema.outputs)
        for place, needed in enumerate(required):
            assert not needed or (place < len(node.input) and node.input[place])
        given = _attributes(node)
        assert given.keys() <= schema.attributes.keys()
        assert {name for name, attr in schema.attributes.items() if attr.required} <= given.keys()


def test_onnx_runtime_resolves_all_types_and_misses_only_kernels(exported: Exported) -> None:
    for model in _models(exported):
        data = model.SerializeToString()
        values = {
            tensor.name: np.zeros(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_external_initializers(
            list(values), [ort.OrtValue.ortvalue_from_numpy(value) for value in values.values()]
        )
        kinds = {node.op_type for node in model.graph.node}
        if not kinds & {"GroupNorm", "SkipGroupNorm", "BiasSplitGelu"}:
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            continue
        with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*(GroupNorm|BiasSplitGelu)"):
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def test_norms_are_ones_that_the_kernel_takes(exported: Exported) -> None:
    for model in _models(exported):
        sizes, types = {t.name: list(t.dims) for t in model.graph.initializer}, _types(model)
        for node in model.graph.node:
            if node.op_type not in ("GroupNorm", "SkipGroupNorm"):
                continue
            attrs, (gamma, beta) = _attributes(node), node.input[1:3]
            assert attrs["channels_last"] == 1
            assert cuda.group_norm(sizes[gamma][0], attrs["groups"])
            assert types[gamma] == types[beta] == FLOAT


@pytest.mark.parametrize(
    ("channels", "groups", "taken"),
    [
        *((channels, 32, True) for channels in (128, 320, 512, 960, 1920, 2560, 3072)),
        *((16, 4, True), (512, 1, True)),
        # Odd channels a group, channels that the groups do not divide, a group wider than a block.
        *((96, 32, False), (10, 4, False), (1026, 1, False)),
    ],
)
def test_which_norms_the_kernel_takes(channels: int, groups: int, taken: bool) -> None:
    assert cuda.group_norm(channels, groups) == taken


def test_what_is_narrow_and_what_is_not(exported: Exported) -> None:
    upcast = exported.entry["vae"]["force_upcast"]
    for component in exported.entry["graphs"]:
        model = exported.graph(component, "cuda")
        full = {name for name, kind in _types(model).items() if kind == FLOAT and "." in name and name[:5] != "const"}
        if component.startswith("vae") and upcast:
            assert FLOAT16 not in _types(model).values()
        else:
            normed = {name for node in model.graph.node if "GroupNorm" in node.op_type for name in node.input[1:3]}
            assert full == normed
        for port in (*model.graph.input, *model.graph.output):
            narrow = port.name.startswith(("text_kv_", "image_kv_"))
            kind = port.type.tensor_type.elem_type
            whole = port.name in ("input_ids", "image_valid")
            assert kind == (FLOAT16 if narrow else onnx.TensorProto.INT64 if whole else FLOAT)


def test_transposes_stand_only_beside_convolutions() -> None:
    """Where every norm has a kernel; norms that have none are computed channels-first."""
    for component in ("unet", "vae_decoder", "vae_encoder"):
        path = TINY / "graphs" / "tiny" / f"{component}.cuda.onnx.gz"
        graph = onnx.load_from_string(gzip.decompress(path.read_bytes())).graph
        assert "InstanceNormalization" not in {node.op_type for node in graph.node}
        made = {name: node.op_type for node in graph.node for name in node.output}
        readers: dict[str, set[str]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(node.op_type)
        ports = {port.name for port in graph.output}
        transposes = [node for node in graph.node if node.op_type == "Transpose"]
        assert transposes
        for node in transposes:
            (out,) = node.output
            assert made.get(node.input[0]) == "Conv" or out in ports or readers[out] == {"Conv"}


class _Geglu(nn.Module):
    """A feed-forward block with a width that has a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"wide": nn.Linear(8, cuda.SPLIT_GELU[0]), "out": nn.Linear(1280, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = op.halves(op.linear(self.net["wide"], op.flatten(x)))
        return op.unflatten(op.linear(self.net["out"], value * op.gelu(gate)), x)


@pytest.mark.parametrize("half", [False, True])
def test_geglu_is_one_operator_where_its_width_has_a_kernel(half: bool) -> None:
    ports = (graphs.Port("x", ("batch", "tokens", 8)),), (graphs.Port("y", ("batch", "tokens", 8)),)
    spec = graphs.Graph("ff", "unet", *ports, _Geglu, 1e-5, half=half)
    data = trace.lower(trace.trace(spec), spec, cuda.DIALECT, lambda name, _shape: name)
    kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert kinds.count("BiasSplitGelu") == 1
    assert not {"Split", "Gelu", "Mul"} & set(kinds)
    torch.manual_seed(0)
    net = _Geglu().net
    tensors = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    session = verify.open_session(data, tensors)
    x = torch.randn(3, 5, 8)
    value, gate = net["wide"](x).chunk(2, dim=-1)
    expected = net["out"](value * nn.functional.gelu(gate)).detach().numpy()
    (found,) = session.run(None, {"x": x.numpy()})
    assert verify.relative_error(found, expected) < (2e-3 if half else 1e-5)
    assert emulate.on_cpu(data) != data
