"""Rewrites the composite nodes of a traced graph into ONNX operators; what all dialects share.

Initializers with a checkpoint's name are only ever node inputs here: nothing folds, transposes or merges them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export import composite

OPSET = 21


class Emitter:
    """Inserts nodes before the composite that is being replaced; shares constants and shape computations."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.at: ir.Node | None = None
        self._constants: dict[tuple, ir.Value] = {}
        self._shared: dict[tuple, ir.Value] = {}

    def node(self, op: str, inputs: Sequence[ir.Value | None], outputs: int = 1, domain: str = "", **attrs: object):
        """Adds a node; returns its output, or all of them as a tuple when there are several."""
        new = ir.node(op, inputs, attributes=attrs or None, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.at, new)
        return new.outputs[0] if outputs == 1 else tuple(new.outputs)

    def constant(self, value: object, dtype: type = np.int64) -> ir.Value:
        """A small constant, one initializer for equal contents."""
        array = np.ascontiguousarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const.{len(self._constants)}"
            tensor = ir.Tensor(array, name=name)
            new = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(new)
            self._constants[key] = new
        return self._constants[key]

    def adopt_constants(self) -> None:
        """Shares the constants that the graph holds already."""
        for value in self.graph.initializers.values():
            if value.const_value is not None:
                array = np.ascontiguousarray(value.const_value.numpy())
                self._constants.setdefault((array.dtype.str, array.shape, array.tobytes()), value)

    def shared(self, key: tuple, make: Callable[[], ir.Value]) -> ir.Value:
        """The value under `key`, made at its first use."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def sizes(self, x: ir.Value, start: int, end: int) -> ir.Value:
        """Dimensions start..end of x as int64."""
        return self.shared(("sizes", x, start, end), lambda: self.node("Shape", [x], start=start, end=end))

    def batched(self, x: ir.Value, like: ir.Value, tail: Sequence[int]) -> ir.Value:
        """Flat x as `[batch of like, *tail]`, where tail holds one -1."""

        def shape() -> ir.Value:
            return self.node("Concat", [self.sizes(like, 0, 1), self.constant(list(tail))], axis=0)

        return self.node("Reshape", [x, self.shared(("batched", like, *tail), shape)])

    def flat(self, x: ir.Value, width: int) -> ir.Value:
        """`[..., width]` as `[rows, width]`."""
        return self.node("Reshape", [x, self.constant([-1, width])])


def drop_unused(graph: ir.Graph) -> None:
    """Removes nodes and initializers that nothing reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


@dataclass(frozen=True)
class Attention:
    """One composite attention: values, rank of k and v, attributes."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    like: ir.Value
    width: int
    heads: int
    scale: float
    causal: bool
    # [batch, tokens of k] int32, 0 for those that are padding; None where all count.
    valid: ir.Value | None = None

    @property
    def default_scale(self) -> bool:
        """Whether the scale is what operators assume: 1/sqrt(width of a head)."""
        return abs(self.scale * (self.width // self.heads) ** 0.5 - 1) < 1e-6


@dataclass(frozen=True)
class Dialect:
    """The choices that differ between dialects."""

    name: str
    attention: Callable[[Emitter, Attention], ir.Value]
    group_norm: Callable[[Emitter, Sequence[ir.Value], int, float], ir.Value]
    upsample_conv: Callable[[Emitter, Sequence[ir.Value]], ir.Value]

    def lower(self, model: ir.Model) -> None:
        """Replaces every composite node in place and sets the operator sets."""
        emitter = Emitter(model.graph)
        for node in list(model.graph):
            if node.domain != composite.DOMAIN:
                continue
            emitter.at = node
            new = _LOWER[node.op_type](self, emitter, node)
            new = new if isinstance(new, tuple) else (new,)
            for old, value in zip(node.outputs, new, strict=True):
                value.name, old.name = old.name, None
                value.type, value.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(node.outputs, new, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        model.opset_imports.clear()
        model.opset_imports[""] = OPSET
        if any(node.domain == "com.microsoft" for node in model.graph):
            model.opset_imports["com.microsoft"] = 1

    def finish(self, model: ir.Model, ports: Collection[str] | None) -> None:
        """What a dialect does when all is lowered and constants are initializers.

        `ports` names the inputs and outputs that are f16 where the dialect computes in f16; None keeps all in f32.
        """


def _attr(node: ir.Node, name: str):
    return node.attributes[name].value


def _linear(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.node("Gemm", node.inputs, transB=1)


def _group_norm(dialect: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return dialect.group_norm(emit, node.inputs, _attr(node, "groups"), _attr(node, "epsilon"))


def _layer_norm(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.node("LayerNormalization", node.inputs, axis=-1, epsilon=_attr(node, "epsilon"))


def _gelu(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.node("Gelu", node.inputs, approximate=_attr(node, "approximate"))


def _attention(dialect: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    q, k, v, like = node.inputs
    width = node.outputs[0].shape[1]

    def tokens(x: ir.Value) -> ir.Value:
        return emit.batched(x, like, [-1, width]) if len(x.shape) == 2 else x

    call = Attention(
        *map(tokens, (q, k, v)), like, width, _attr(node, "heads"), _attr(node, "scale"), bool(_attr(node, "causal"))
    )
    return emit.flat(dialect.attention(emit, call), width)


def _merge_sources(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, valid = node.inputs
    parts = [emit.constant([0, -1]), emit.sizes(valid, 1, 2), emit.constant([_attr(node, "width")])]
    return emit.node("Reshape", [x, emit.node("Concat", parts, axis=0)])


def _valid(emit: Emitter, valid: ir.Value, like: ir.Value) -> ir.Value:
    """`[sources, tokens]` of 0 and 1 as `[batch*sources, tokens]` int32."""
    shape = emit.node("Concat", [emit.sizes(like, 0, 1), emit.constant([1, 1])], axis=0)
    rows = emit.node("Expand", [valid, shape])
    rows = emit.node("Reshape", [rows, emit.node("Concat", [emit.constant([-1]), emit.sizes(valid, 1, 2)], axis=0)])
    return emit.node("Cast", [rows], to=ir.DataType.INT32.value)


def _image_attention(dialect: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    q, k, v, valid, area, like = node.inputs
    width = node.outputs[0].shape[1]

    def shape(key: str, *parts: ir.Value) -> ir.Value:
        return emit.shared((key, area, like, width), lambda: emit.node("Concat", list(parts), axis=0))

    batch, sources, places, last = (
        emit.sizes(like, 0, 1),
        emit.sizes(valid, 0, 1),
        emit.sizes(area, 1, 2),
        emit.constant([width]),
    )
    one = emit.constant([1])
    # Every source asks with the same queries: [batch, sources, positions, width], then sources beside the batch.
    q = emit.node("Reshape", [q, shape("queries", batch, one, places, last)])
    q = emit.node("Expand", [q, shape("sources", one, sources, one, one)])
    q = emit.node("Reshape", [q, shape("rows", emit.constant([-1]), places, last)])
    mask = emit.shared(("valid", valid, like), lambda: _valid(emit, valid, like))
    call = Attention(q, k, v, like, width, _attr(node, "heads"), _attr(node, "scale"), causal=False, valid=mask)
    y = dialect.attention(emit, call)
    y = emit.node("Reshape", [y, shape("answers", emit.constant([-1]), sources, places, last)])
    weight = emit.shared(("weight", area), lambda: emit.node("Unsqueeze", [area, emit.constant([2])]))
    y = emit.node("ReduceSum", [emit.node("Mul", [y, weight]), one], keepdims=0)
    return emit.flat(y, width)


def _unstack(_: Dialect, emit: Emitter, node: ir.Node):
    count = len(node.outputs)
    parts = emit.node("Split", node.inputs, count, axis=0, num_outputs=count) if count > 1 else (node.inputs[0],)
    return tuple(emit.node("Squeeze", [part, emit.constant([0])]) for part in parts)


def _halves(_: Dialect, emit: Emitter, node: ir.Node):
    return emit.node("Split", node.inputs, 2, axis=1, num_outputs=2)


def _stack(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    *parts, like = node.inputs
    count, width = len(parts), node.outputs[0].shape[3]
    whole = emit.node("Concat", parts, axis=0)
    ends = [emit.constant([count]), emit.sizes(like, 0, 1), emit.constant([-1, width])]
    return emit.node("Reshape", [whole, emit.node("Concat", ends, axis=0)])


def _to_tokens(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    (x,) = node.inputs
    return emit.flat(emit.node("Transpose", [x], perm=[0, 2, 3, 1]), x.shape[1])


def _to_image(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, like = node.inputs
    width = _attr(node, "width")

    def shape() -> ir.Value:
        ends = [emit.sizes(like, 0, 1), emit.sizes(like, 2, 4), emit.constant([width])]
        return emit.node("Concat", ends, axis=0)

    x = emit.node("Reshape", [x, emit.shared(("image", like, width), shape)])
    return emit.node("Transpose", [x], perm=[0, 3, 1, 2])


def _flatten(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.flat(node.inputs[0], _attr(node, "width"))


def _unflatten(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, like = node.inputs
    return emit.batched(x, like, [-1, _attr(node, "width")])


def _split_rows(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.flat(node.inputs[0], _attr(node, "width"))


def _group_rows(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.node("Reshape", [node.inputs[0], emit.constant([-1, _attr(node, "count"), _attr(node, "width")])])


def _repeat(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    table, like = node.inputs
    ends = [emit.sizes(like, 0, 1), emit.constant([_attr(node, "tokens"), _attr(node, "width")])]
    return emit.node("Expand", [table, emit.node("Concat", ends, axis=0)])


def _first(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, like = node.inputs
    width = _attr(node, "width")
    return emit.flat(emit.node("Gather", [emit.batched(x, like, [-1, width]), emit.constant([0])], axis=1), width)


_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def double(emit: Emitter, x: ir.Value) -> ir.Value:
    """Nearest neighbour by two."""
    return emit.node("Resize", [x, None, emit.constant([1, 1, 2, 2], np.float32)], **_NEAREST)


def resize_conv(emit: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    """The upsampling convolution as two operators."""
    x, *parameters = inputs
    return emit.node("Conv", [double(emit, x), *parameters], kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def _upsample_conv(dialect: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return dialect.upsample_conv(emit, node.inputs)


def _upsample(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, *like = node.inputs
    if not like:
        return double(emit, x)
    sizes = emit.node("Concat", [emit.sizes(x, 0, 2), emit.sizes(like[0], 2, 4)], axis=0)
    return emit.node("Resize", [x, None, None, sizes], **_NEAREST)


def _sinusoid(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    (x,) = node.inputs
    freqs = _attr(node, "frequencies")
    angles = emit.node("Unsqueeze", [x, emit.constant([2])])
    angles = emit.node("Mul", [angles, emit.constant(freqs, np.float32)])
    halves = [emit.node("Cos", [angles]), emit.node("Sin", [angles])]
    both = emit.node("Concat", halves if _attr(node, "cos_first") else halves[::-1], axis=-1)
    return emit.flat(both, _attr(node, "count") * 2 * len(freqs))


def _embed(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    return emit.node("Gather", node.inputs, axis=0)


def _positions(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    table, ids = node.inputs
    return emit.node("Slice", [table, emit.constant([0]), emit.sizes(ids, 1, 2), emit.constant([0])])


def _pick_end(_: Dialect, emit: Emitter, node: ir.Node) -> ir.Value:
    x, ids = node.inputs
    end = _attr(node, "end")
    if end >= 0:
        ids = emit.node("Equal", [ids, emit.constant(end)])
    # ArgMax knows floats on every provider; ids are far below 2^24. The first maximum wins, as in torch.
    score = emit.node("Cast", [ids], to=ir.DataType.FLOAT.value)
    where = emit.node("ArgMax", [score], axis=1, keepdims=1, select_last_index=0)
    tokens = emit.batched(x, node.inputs[1], [-1, _attr(node, "width")])
    return emit.node("GatherND", [tokens, where], batch_dims=1)


_LOWER: dict[str, Callable] = {
    "Linear": _linear,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "Gelu": _gelu,
    "Attention": _attention,
    "ImageAttention": _image_attention,
    "MergeSources": _merge_sources,
    "Unstack": _unstack,
    "Halves": _halves,
    "Stack": _stack,
    "ToTokens": _to_tokens,
    "ToImage": _to_image,
    "Flatten": _flatten,
    "Unflatten": _unflatten,
    "SplitRows": _split_rows,
    "GroupRows": _group_rows,
    "Repeat": _repeat,
    "First": _first,
    "Upsample": _upsample,
    "UpsampleConv": _upsample_conv,
    "Sinusoid": _sinusoid,
    "Embed": _embed,
    "Positions": _positions,
    "PickEnd": _pick_end,
}
