"""Folds neighbours of a channels-last graph into the operators that ONNX Runtime's CUDA provider has for them.

Biases of a convolution or product move into the operator
that reads it, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from export.dialects.layout import TO_LAST, is_transpose
from export.dialects.lowering import Emitter

MICROSOFT = "com.microsoft"


def fuse(emit: Emitter, split_gelu: Callable[[int], bool]) -> None:
    """Rewrites the emitter's graph in place; `split_gelu` says for which widths there is a kernel."""
    for node in list(emit.graph):
        if node.graph is None:
            continue
        emit.at = node
        if node.op_type == "GroupNorm":
            _silu(node)
            _skip_group_norm(emit, node)
        elif node.op_type == "LayerNormalization":
            _skip_layer_norm(emit, node)
        elif node.op_type == "Split":
            _split_gelu(emit, node, split_gelu)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _silu(norm: ir.Node) -> None:
    (y,) = norm.outputs
    readers = {use.node for use in y.uses()}
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = next((node for node in readers if node.op_type == "Mul"), None)
    if sigmoid is None or readers != {sigmoid, product} or set(product.inputs) != {y, sigmoid.outputs[0]}:
        return
    if y.is_graph_output() or _only_reader(sigmoid.outputs[0]) is not product:
        return
    norm.attributes["activation"] = ir.AttrInt64("activation", 1)
    replaced = product.outputs[0]
    y.shape, y.type = replaced.shape or y.shape, replaced.type or y.type
    ir.convenience.replace_all_uses_with(replaced, y)
    norm.graph.remove([product, sigmoid], safe=True)


def _same(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and list(a.shape) == list(b.shape)


def _row(x: ir.Value, skip: ir.Value) -> bool:
    """Whether `skip` is `[batch, 1, 1, channels]` to x `[batch, height, width, channels]`."""
    if x.shape is None or skip.shape is None:
        return False
    full, row = list(x.shape), list(skip.shape)
    return len(full) == len(row) == 4 and row[1] == row[2] == 1 and row[0] == full[0] and row[3] == full[3]


def _sum(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == "Add" else None


def _taken_bias(x: ir.Value) -> ir.Value | None:
    """Takes the bias from the Conv or Gemm whose result x is, seen through a change of form; None if there is none."""
    value = x
    while _only_reader(value) is not None and (node := value.producer()) is not None:
        if is_transpose(node, TO_LAST) or node.op_type == "Reshape":
            value = node.inputs[0]
        elif node.op_type in ("Conv", "Gemm") and len(node.inputs) == 3:
            bias = node.inputs[2]
            if list(bias.shape) != [x.shape[-1]]:
                return None
            node.resize_inputs(2)
            return bias
        else:
            return None
    return None


def _operands(total: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The sum as (x, skip, bias of x), x being one that gives its bias away if there is such."""
    a, b = total.inputs
    for x, skip in ((a, b), (b, a)):
        if x is not skip and (bias := _taken_bias(x)) is not None:
            return x, skip, bias
    return a, b, None


def _skip_group_norm(emit: Emitter, norm: ir.Node) -> None:
    total = _sum(norm.inputs[0])
    if total is None:
        return
    a, b = total.inputs
    if _same(a, b) and len(a.shape) == 4:
        x, skip, bias = _operands(total)
    elif _row(a, b) or _row(b, a):
        x, skip = (a, b) if _row(a, b) else (b, a)
        bias = _taken_bias(x)
    else:
        return
    # The sum is read by others too, before the norm perhaps, so the fused operator stands where the sum did.
    emit.at = total
    kept = len(list(total.outputs[0].uses())) > 1 or total.outputs[0].is_graph_output()
    inputs = [x, *norm.inputs[1:3], skip] + ([] if bias is None else [bias])
    attrs = {name: attr.value for name, attr in norm.attributes.items()}
    new = emit.node("SkipGroupNorm", inputs, 2 if kept else 1, domain=MICROSOFT, **attrs)
    outputs = new if kept else (new,)
    _replace(norm.outputs[0], outputs[0])
    if kept:
        _replace(total.outputs[0], outputs[1])


def _skip_layer_norm(emit: Emitter, norm: ir.Node) -> None:
    total = _sum(norm.inputs[0])
    if total is None or not _same(*total.inputs) or len(total.inputs[0].shape) not in (2, 3):
        return
    x, skip, bias = _operands(total)
    emit.at = total
    kept = len(list(total.outputs[0].uses())) > 1 or total.outputs[0].is_graph_output()
    inputs = [x, skip, *norm.inputs[1:3]] + ([] if bias is None else [bias])
    epsilon = norm.attributes["epsilon"].value
    new = emit.node("SkipLayerNormalization", inputs, 4 if kept else 1, domain=MICROSOFT, epsilon=epsilon)
    outputs = new if kept else (new,)
    _replace(norm.outputs[0], outputs[0])
    if kept:
        outputs[1].name = outputs[2].name = ""
        _replace(total.outputs[0], outputs[3])


def _split_gelu(emit: Emitter, split: ir.Node, known: Callable[[int], bool]) -> None:
    if len(split.outputs) != 2 or (product := _only_reader(split.outputs[0])) is None or product.op_type != "Mul":
        return
    gelu = _only_reader(split.outputs[1])
    if gelu is None or gelu.op_type != "Gelu" or gelu.attributes["approximate"].value != "none":
        return
    if set(product.inputs) != {split.outputs[0], gelu.outputs[0]} or _only_reader(gelu.outputs[0]) is not product:
        return
    wide = split.inputs[0]
    width = wide.shape[-1] if wide.shape is not None else None
    if not isinstance(width, int) or len(wide.shape) != 2 or not known(width):
        return
    bias = _taken_bias(wide)
    if bias is None:
        return
    emit.at = product
    rows = emit.node("Reshape", [wide, emit.constant([1, -1, width])])
    rows = emit.node("BiasSplitGelu", [rows, bias], domain=MICROSOFT)
    _replace(product.outputs[0], emit.flat(rows, width // 2))


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    _retire(old.producer())


def _retire(node: ir.Node | None) -> None:
    """Removes a node that nothing reads, and what only it has read."""
    if node is None or node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    before = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for producer in before:
        _retire(producer)
