"""Spells out the operators that only the CUDA provider has, so that its graphs can be computed and compared on the CPU.

The arithmetic is that of the kernels: sums and statistics in f32, results rounded to the graph's type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_CUDA_ONLY = ("GroupNorm", "SkipGroupNorm", "BiasSplitGelu")


def on_cpu(data: bytes) -> bytes:
    """The same model without operators that only the CUDA provider has."""
    model = onnx.load_from_string(data)
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    spelling = _Spelling(TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.domain == "com.microsoft" and node.op_type in _CUDA_ONLY:
            nodes.extend(spelling.of(node))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(spelling.constants.values())
    return model.SerializeToString(deterministic=True)


class _Spelling:
    """Makes the nodes; shares constants."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.constants: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.count = 0

    def of(self, node: NodeProto) -> Iterator[NodeProto]:
        """What takes the node's place."""
        self.nodes = []
        if node.op_type == "BiasSplitGelu":
            self.bias_split_gelu(node)
        else:
            self.group_norm(node)
        yield from self.nodes

    def op(self, kind: str, inputs: list[str], out: str | None = None, **attrs: object) -> str:
        out = out or self.fresh()
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"for {out}", **attrs))
        return out

    def fresh(self) -> str:
        self.count += 1
        return f"cpu.{self.count}"

    def constant(self, value: object, dtype: type = np.int64) -> str:
        array = np.ascontiguousarray(value, dtype=dtype)
        name = f"cpu.const.{array.dtype.name}.{'x'.join(map(str, array.ravel().tolist()))}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def full(self, x: str) -> str:
        return self.op("Cast", [x], to=TensorProto.FLOAT)

    def bias_split_gelu(self, node: NodeProto) -> None:
        x, bias = node.input
        both = self.op("Add", [x, bias])
        value, gate = self.fresh(), self.fresh()
        self.nodes.append(helper.make_node("Split", [both], [value, gate], name=f"for {value}", axis=-1, num_outputs=2))
        gate = self.op("Gelu", [self.full(gate)], approximate="none")
        self.op("Cast", [self.op("Mul", [self.full(value), gate])], node.output[0], to=self.kind)

    def group_norm(self, node: NodeProto) -> None:
        attrs = {attr.name: helper.get_attribute_value(attr) for attr in node.attribute}
        x, gamma, beta, *more = node.input
        if more:
            skip, *bias = more
            for part in bias:
                x = self.op("Add", [x, part])
            x = self.op("Add", [x, skip], node.output[1] if len(node.output) > 1 else None)
        wide = self.full(x)
        # [batch, height, width, channels] as [batch, positions, groups, channels of a group]
        groups = self.grouped(wide, attrs["groups"])
        axes = self.constant([1, 3])
        centred = self.op("Sub", [groups, self.op("ReduceMean", [groups, axes], keepdims=1)])
        variance = self.op("ReduceMean", [self.op("Mul", [centred, centred]), axes], keepdims=1)
        spread = self.op("Sqrt", [self.op("Add", [variance, self.constant(attrs["epsilon"], np.float32)])])
        y = self.op("Reshape", [self.op("Div", [centred, spread]), self.op("Shape", [x])])
        y = self.op("Add", [self.op("Mul", [y, gamma]), beta])
        if attrs["activation"]:
            y = self.op("Mul", [y, self.op("Sigmoid", [y])])
        self.op("Cast", [y], node.output[0], to=self.kind)

    def grouped(self, x: str, groups: int) -> str:
        batch = self.op("Shape", [x], start=0, end=1)
        channels = self.op("Shape", [x], start=3, end=4)
        width = self.op("Div", [channels, self.constant([groups])])
        shape = self.op("Concat", [batch, self.constant([-1, groups]), width], axis=0)
        return self.op("Reshape", [x, shape])
