"""Lets a graph compute in f16: weights and activations narrow, with f32 where it matters.

f32 stay the border (but for ports declared narrow), the sinusoids of time, whose arguments reach a thousand, and what
kernels want in f32. Norms and softmax accumulate in f32 inside their kernels.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from export.dialects.lowering import Emitter
from export.errors import ExportError

_HALF, _FULL, _INT = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
# Inputs that an operator takes in f32 whatever the rest is.
_ALWAYS_FULL = {"GroupNorm": (1, 2), "SkipGroupNorm": (1, 2), "Resize": (1, 2)}
# Operators that stay in f32 as long as nothing narrow or from a checkpoint enters them.
_STAYS_FULL = {"Unsqueeze", "Squeeze", "Reshape", "Concat", "Mul", "Sub", "Cos", "Sin"}
_INTEGER = {"Shape": _INT, "ArgMax": _INT, "Equal": ir.DataType.BOOL}


def narrow(emit: Emitter, ports: Collection[str]) -> None:
    """Rewrites the emitter's graph in place; the inputs and outputs called `ports` become f16."""
    pass_ = _Pass(emit)
    for value in emit.graph.inputs:
        if value.name in ports:
            value.type = ir.TensorType(_HALF)
        pass_.types[value] = value.dtype
    for node in list(emit.graph):
        emit.at = node
        pass_.visit(node)
    pass_.outputs(ports)


class _Pass:
    def __init__(self, emit: Emitter) -> None:
        self.emit = emit
        self.types: dict[ir.Value, ir.DataType] = {}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def type_of(self, value: ir.Value) -> ir.DataType:
        if value in self.types:
            return self.types[value]
        if not value.is_initializer():
            raise ExportError(f"{value.name} is read before it is made: a bug in the exporter")
        return value.dtype if value.const_value is None else value.const_value.dtype

    def visit(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        floats = [value for value in inputs if self.type_of(value) in (_FULL, _HALF)]
        if node.op_type in _INTEGER:
            self.made(node, _INTEGER[node.op_type])
        elif node.op_type == "Cast":
            self.made(node, ir.DataType(node.attributes["to"].value))
        elif not floats:
            self.made(node, self.type_of(inputs[0]))
        elif node.op_type in _STAYS_FULL and self.full(floats):
            self.made(node, _FULL)
        else:
            kept = _ALWAYS_FULL.get(node.op_type, ())
            for i, value in enumerate(node.inputs):
                if value is not None and self.type_of(value) in (_FULL, _HALF):
                    node.replace_input_with(i, self.as_type(value, _FULL if i in kept else _HALF))
            self.made(node, _HALF)

    def full(self, floats: list[ir.Value]) -> bool:
        """Whether values are f32 that is computed, with constants beside them."""
        constant = [value.is_initializer() and value.const_value is not None for value in floats]
        computed = [value for value, known in zip(floats, constant, strict=True) if not known]
        return bool(computed) and not any(v.is_initializer() or self.type_of(v) is not _FULL for v in computed)

    def made(self, node: ir.Node, dtype: ir.DataType) -> None:
        for value in node.outputs:
            self.types[value] = dtype
            value.type = ir.TensorType(dtype)

    def as_type(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.is_initializer() and value.const_value is None:
            return self.weight(value, wanted)
        if self.type_of(value) is wanted:
            return value
        if value.is_initializer():
            return self.emit.constant(value.const_value.numpy(), np.float16 if wanted is _HALF else np.float32)
        if (value, wanted) not in self.casts:
            new = self.emit.node("Cast", [value], to=wanted.value)
            self.types[new], new.type, new.shape = wanted, ir.TensorType(wanted), value.shape
            self.casts[value, wanted] = new
        return self.casts[value, wanted]

    def weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A checkpoint's tensor, declared in the type that its readers want."""
        if self.types.setdefault(value, wanted) is not wanted:
            raise ExportError(f"{value.name} is wanted in f16 and in f32: a bug in the exporter")
        value.type = ir.TensorType(wanted)
        return value

    def outputs(self, ports: Collection[str]) -> None:
        graph = self.emit.graph
        for i, old in enumerate(graph.outputs):
            wanted = _HALF if old.name in ports else _FULL
            if self.type_of(old) is wanted:
                continue
            cast = ir.node("Cast", [old], attributes={"to": wanted.value})
            graph.append(cast)
            (new,) = cast.outputs
            graph.outputs[i] = new
            new.name, old.name = old.name, None
            new.shape, new.type = old.shape, ir.TensorType(wanted)
