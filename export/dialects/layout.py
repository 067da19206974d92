"""Turns a lowered graph to channels-last: between convolutions, images are `[batch, height, width, channels]`.

Convolutions keep their standard form with a Transpose before and after; ONNX Runtime's `prefer_nhwc` puts the opposite
pair around each Conv, and neighbours cancel. Everything else is rewritten here, so that no Transpose is left to chance.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.dialects.lowering import Emitter
from export.errors import ExportError

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Sigmoid", "Clip", "Gelu", "Tanh", "Pow"}


def to_channels_last(emit: Emitter) -> None:
    """Rewrites the emitter's graph in place; what is superseded stays behind unused."""
    pass_ = _Pass(emit)
    for node in list(emit.graph):
        emit.at = node
        pass_.visit(node)
    pass_.finish()


def is_transpose(node: ir.Node | None, perm: list[int]) -> bool:
    """Whether a node permutes its axes by `perm`."""
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].value) == perm


class _Pass:
    """What is known while the nodes are visited in order."""

    def __init__(self, emit: Emitter) -> None:
        self.emit = emit
        # Values that are `[batch, channels, height, width]` in the graph as it came.
        self.images: set[ir.Value] = set()
        # Those values channels-last, and back where something needs the first form.
        self.last: dict[ir.Value, ir.Value] = {}
        self.first: dict[ir.Value, ir.Value] = {}
        # Images whose node is superseded by one that makes their channels-last form.
        self.shadows: set[ir.Value] = set()

    def visit(self, node: ir.Node) -> None:
        handler = _HANDLERS.get(node.op_type)
        if node.op_type in _POINTWISE:
            handler = _Pass.pointwise
        if handler is not None and any(value in self.images for value in node.inputs):
            handler(self, node)
        elif node.op_type == "Conv":
            self.images.add(node.outputs[0])
        elif is_transpose(node, TO_FIRST):
            (out,) = node.outputs
            self.supersede(out, node.inputs[0])
        elif node.op_type == "GroupNorm":
            self.group_norm(node)
        else:
            self.others(node)

    def others(self, node: ir.Node) -> None:
        for i, value in enumerate(node.inputs):
            if value in self.shadows:
                node.replace_input_with(i, self.to_first(value))

    def supersede(self, old: ir.Value, new: ir.Value) -> None:
        if old.shape is not None and new.shape is None:
            new.shape, new.type = ir.Shape([old.shape[i] for i in TO_LAST]), old.type
        self.images.add(old)
        self.shadows.add(old)
        self.last[old] = new

    def to_last(self, value: ir.Value) -> ir.Value:
        """The image channels-last; a Transpose where its first form is what is computed."""
        if value not in self.last:
            self.last[value] = self.emit.node("Transpose", [value], perm=TO_LAST)
            if value.shape is not None:
                self.last[value].shape = ir.Shape([value.shape[i] for i in TO_LAST])
                self.last[value].type = value.type
        return self.last[value]

    def to_first(self, value: ir.Value) -> ir.Value:
        """The image channels-first."""
        if value not in self.shadows:
            return value
        if value not in self.first:
            last = self.last[value]
            made = last.producer()
            known = is_transpose(made, TO_LAST)
            self.first[value] = made.inputs[0] if known else self.emit.node("Transpose", [last], perm=TO_FIRST)
        return self.first[value]

    def conv(self, node: ir.Node) -> None:
        node.replace_input_with(0, self.to_first(node.inputs[0]))
        self.images.add(node.outputs[0])

    def transpose(self, node: ir.Node) -> None:
        if not is_transpose(node, TO_LAST):
            return self.others(node)
        ir.convenience.replace_all_uses_with(node.outputs[0], self.to_last(node.inputs[0]))
        return None

    def group_norm(self, node: ir.Node) -> None:
        x, *rest = node.inputs
        self.rebuild(node, [self.to_last(x), *rest])

    def pointwise(self, node: ir.Node) -> None:
        self.rebuild(node, [self.operand(value, node) for value in node.inputs])

    def operand(self, value: ir.Value | None, node: ir.Node) -> ir.Value | None:
        if value is None or value in self.images:
            return value if value is None else self.to_last(value)
        if value.is_initializer() and value.shape.numpy() and int(np.prod(value.shape.numpy())) == 1:
            return value
        if value.is_initializer() and not value.shape.numpy():
            return value
        dims = list(value.shape or ())
        if len(dims) != 4:
            raise ExportError(f"{node.op_type} of an image and a tensor of shape {dims}: a bug in the exporter")
        if dims[2] != 1 or dims[3] != 1:
            return self.to_last(value)
        row = self.emit.node("Reshape", [value, self.emit.constant([0, 1, 1, -1])])
        row.shape, row.type = ir.Shape([dims[0], 1, 1, dims[1]]), value.type
        return row

    def concat(self, node: ir.Node) -> None:
        if node.attributes["axis"].value != 1 or not all(value in self.images for value in node.inputs):
            return self.others(node)
        new = self.emit.node("Concat", [self.to_last(value) for value in node.inputs], axis=3)
        return self.supersede(node.outputs[0], new)

    def split(self, node: ir.Node) -> None:
        if node.attributes["axis"].value != 1:
            return self.others(node)
        count = len(node.outputs)
        parts = self.emit.node("Split", [self.to_last(node.inputs[0])], count, axis=3, num_outputs=count)
        for old, new in zip(node.outputs, parts, strict=True):
            self.supersede(old, new)
        return None

    def pad(self, node: ir.Node) -> None:
        x, pads, *rest = node.inputs
        ends = pads.const_value.numpy()
        order = [*TO_LAST, *(axis + 4 for axis in TO_LAST)]
        self.rebuild(node, [self.to_last(x), self.emit.constant(ends[order]), *rest])

    def resize(self, node: ir.Node) -> None:
        x, roi, scales, *sizes = node.inputs
        if scales is not None:
            scales = self.emit.constant(scales.const_value.numpy()[TO_LAST], np.float32)
        sizes = [self.emit.node("Gather", [size, self.emit.constant(TO_LAST)], axis=0) for size in sizes]
        self.rebuild(node, [self.to_last(x), roi, scales, *sizes])

    def shape(self, node: ir.Node) -> None:
        (x,) = node.inputs
        if x not in self.shadows:
            return
        start, end = node.attributes["start"].value, node.attributes["end"].value
        # batch, channels, height, width -> where they are channels-last
        ranges = {(0, 1): [(0, 1)], (0, 2): [(0, 1), (3, 4)], (2, 4): [(1, 3)], (1, 2): [(3, 4)]}
        if (start, end) not in ranges:
            self.others(node)
            return
        parts = [self.emit.sizes(self.last[x], *ends) for ends in ranges[start, end]]
        whole = parts[0] if len(parts) == 1 else self.emit.node("Concat", parts, axis=0)
        ir.convenience.replace_all_uses_with(node.outputs[0], whole)

    def rebuild(self, node: ir.Node, inputs: list[ir.Value | None]) -> None:
        attrs = {name: attr.value for name, attr in node.attributes.items()}
        self.supersede(node.outputs[0], self.emit.node(node.op_type, inputs, domain=node.domain, **attrs))

    def finish(self) -> None:
        """Gives every output of the graph its first form, under its own name."""
        graph = self.emit.graph
        # Nodes go before the one at hand; the outputs' come after everything.
        last = graph[-1]
        for i, old in enumerate(graph.outputs):
            if old not in self.shadows:
                continue
            self.emit.at = last
            new = self.to_first(old)
            if new.producer() is not None and new.producer().op_type == "Transpose":
                graph.remove(new.producer())
                graph.append(new.producer())
            graph.outputs[i] = new
            new.name, old.name = old.name, None
            new.shape, new.type = old.shape, old.type


_HANDLERS = {
    "Conv": _Pass.conv,
    "Transpose": _Pass.transpose,
    "GroupNorm": _Pass.group_norm,
    "Concat": _Pass.concat,
    "Split": _Pass.split,
    "Pad": _Pass.pad,
    "Resize": _Pass.resize,
    "Shape": _Pass.shape,
}
