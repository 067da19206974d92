"""Traces a network built from its config alone into a weight-free ONNX model, and writes it down reproducibly."""

from __future__ import annotations

import gc
import gzip
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from export.dialects.lowering import Dialect, drop_unused
from export.errors import ExportError
from export.graphs import TRACE_SIZES, Graph, Port

IR_VERSION = 10
_KINDS = {"f32": (torch.float32, ir.DataType.FLOAT), "i64": (torch.int64, ir.DataType.INT64)}

# name in the hub's convention -> (name in the file)
Resolve = Callable[[str, tuple[int, ...]], str]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and warnings, and without the collector: a fifth of the time goes there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.enable()
        gc.collect()
        logger.setLevel(level)


def _example(port: Port) -> torch.Tensor:
    shape = [TRACE_SIZES[dim] if isinstance(dim, str) else dim for dim in port.shape]
    return torch.zeros(shape, dtype=_KINDS[port.kind][0])


def _dynamic(port: Port) -> dict[int, object]:
    return {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(port.shape) if isinstance(dim, str)}


def trace(graph: Graph) -> ir.Model:
    """Runs the network on fake tensors; the result still holds composite nodes and no weight is materialised."""
    shapes = tuple(_dynamic(port) for port in graph.inputs)
    with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        net = graph.build()
        variadic = len(shapes) - len(_named_arguments(net))
        args = tuple(_example(port) for port in graph.inputs)
        program = torch.onnx.export(
            net,
            args,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            dynamic_shapes=(*shapes[: len(shapes) - variadic], shapes[-variadic:]) if variadic else shapes,
        )
    return program.model


def _named_arguments(net: torch.nn.Module) -> list[str]:
    code = type(net).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def lower(traced: ir.Model, graph: Graph, dialect: Dialect, resolve: Resolve) -> bytes:
    """The serialised ONNX model of one dialect; `traced` is left as it is."""
    model = traced.clone()
    for name, value in model.graph.initializers.items():
        if name.startswith("net."):
            # Whatever type the config names for its weights: a dialect says in which one it takes them.
            value.const_value, value.type = None, ir.TensorType(ir.DataType.FLOAT)
    dialect.lower(model)
    _constants_to_initializers(model.graph)
    drop_unused(model.graph)
    narrow = [port.name for port in (*graph.inputs, *graph.outputs) if port.narrow]
    dialect.finish(model, narrow if graph.half else None)
    drop_unused(model.graph)
    _name_weights(model.graph, graph, resolve)
    _number(model.graph)
    _ports(model.graph.inputs, graph.inputs)
    _ports(model.graph.outputs, graph.outputs)
    model.metadata_props.clear()
    model.metadata_props.update({"tronie.component": graph.component, "tronie.dialect": dialect.name})
    return _serialise(model)


def _constants_to_initializers(graph: ir.Graph) -> None:
    seen: dict[tuple, ir.Value] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is not None:
            array = value.const_value.numpy()
            seen[(array.dtype.str, array.shape, array.tobytes())] = value
    for node in list(graph):
        if node.op_type != "Constant" or node.domain:
            continue
        array = np.ascontiguousarray(_constant(node))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in seen:
            name = f"const.t{len(seen)}"
            new = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
            new.shape, new.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            graph.register_initializer(new)
            seen[key] = new
        ir.convenience.replace_all_uses_with(node.outputs[0], seen[key])
        graph.remove(node, safe=True)


def _constant(node: ir.Node) -> np.ndarray:
    (attr,) = node.attributes.values()
    if attr.name == "value":
        return attr.value.numpy()
    dtype = np.float32 if "float" in attr.name else np.int64
    return np.array(attr.value, dtype=dtype)


def _name_weights(graph: ir.Graph, spec: Graph, resolve: Resolve) -> None:
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        shape = tuple(int(dim) for dim in value.shape)
        key = resolve(spec.rename(name.removeprefix("net.")), shape)
        del graph.initializers[name]
        value.name = key
        value.const_value = ir.ExternalTensor(spec.weights, None, None, value.dtype, name=key, shape=value.shape)
        graph.register_initializer(value)


def _number(graph: ir.Graph) -> None:
    """Short names in order of appearance: the same network always gives the same bytes."""
    keep = {*graph.inputs, *graph.outputs}
    constants: dict[str, ir.Value] = {}
    count = 0
    for i, node in enumerate(graph):
        node.name = f"{node.op_type}_{i}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.inputs:
            if value is not None and value.is_initializer() and not isinstance(value.const_value, ir.ExternalTensor):
                constants.setdefault(value.name, value)
        for value in node.outputs:
            value.metadata_props.clear()
            value.type, value.shape = (value.type, value.shape) if value in keep else (None, None)
            # An optional output that is not wanted has the empty name.
            if value not in keep and value.name != "":
                value.name = f"v{count}"
                count += 1
    for old in constants:
        del graph.initializers[old]
    for i, value in enumerate(constants.values()):
        value.name = value.const_value.name = f"const.{i}"
        graph.register_initializer(value)
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    for _, value in ordered:
        value.metadata_props.clear()
        graph.register_initializer(value)


def _ports(values: list[ir.Value], ports: tuple[Port, ...]) -> None:
    for value, port in zip(values, ports, strict=True):
        if value.name != port.name:
            raise ExportError(f"traced graph calls {value.name!r} what should be {port.name!r}: a bug in the exporter")
        got = [dim if isinstance(dim, int) else None for dim in value.shape]
        want = [dim if isinstance(dim, int) else None for dim in port.shape]
        if got != want:
            raise ExportError(f"{port.name}: traced shape {value.shape}, declared {port.shape}: an axis was baked in")
        narrow = port.narrow and value.dtype is ir.DataType.FLOAT16
        value.shape = ir.Shape(port.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT16 if narrow else _KINDS[port.kind][1])
        value.metadata_props.clear()


def _serialise(model: ir.Model) -> bytes:
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "tronie", None
    model.graph.name, model.graph.doc_string, model.doc_string = model.metadata_props["tronie.component"], None, None
    model.graph.metadata_props.clear()
    model.functions.clear()
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    check(proto)
    return proto.SerializeToString(deterministic=True)


def check(proto: onnx.ModelProto) -> None:
    """The promises of the graph format that the Rust side builds on."""
    simple = {"INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS"}
    known = {tensor.name for tensor in proto.graph.initializer} | {value.name for value in proto.graph.input}
    for node in proto.graph.node:
        for attr in node.attribute:
            kind = onnx.AttributeProto.AttributeType.Name(attr.type)
            if kind not in simple:
                raise ExportError(f"node {node.name} has attribute {attr.name} of type {kind}: a bug in the exporter")
        if missing := [name for name in node.input if name and name not in known]:
            raise ExportError(f"node {node.name} reads {missing} before it is made: a bug in the exporter")
        known.update(node.output)
        if node.domain not in ("", "com.microsoft") or node.op_type == "Constant":
            raise ExportError(
                f"node {node.name} ({node.domain}::{node.op_type}) was not lowered: a bug in the exporter"
            )


def compress(data: bytes) -> bytes:
    """Gzip without a time stamp."""
    return gzip.compress(data, compresslevel=9, mtime=0)


def initializers(data: bytes) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the weights a serialised graph wants."""
    graph = onnx.load_from_string(data).graph
    external = onnx.TensorProto.EXTERNAL
    return {t.name: tuple(t.dims) for t in graph.initializer if t.data_location == external}


def weight_types(data: bytes) -> Mapping[str, np.dtype]:
    """Names and types of the weights a serialised graph wants."""
    graph = onnx.load_from_string(data).graph
    external = onnx.TensorProto.EXTERNAL
    to_numpy = onnx.helper.tensor_dtype_to_np_dtype
    return {t.name: to_numpy(t.data_type) for t in graph.initializer if t.data_location == external}
