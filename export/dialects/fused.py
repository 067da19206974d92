"""The `fused` dialect: contrib attention, which never holds all scores, and a GroupNorm that is cheap on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.dialects.lowering import Attention, Dialect, Emitter


def _attention(emit: Emitter, call: Attention) -> ir.Value:
    attrs: dict[str, object] = {"num_heads": call.heads}
    if not call.default_scale:
        attrs["scale"] = call.scale
    if call.causal:
        attrs["unidirectional"] = 1
    inputs = [call.q, call.k, call.v]
    if call.valid is not None:
        inputs += [None, call.valid]
    return emit.node("MultiHeadAttention", inputs, domain="com.microsoft", **attrs)


def _group_norm(emit: Emitter, inputs: Sequence[ir.Value], groups: int, epsilon: float) -> ir.Value:
    # ONNX Runtime expands GroupNormalization into some twenty nodes on the CPU; InstanceNormalization has a kernel.
    x, weight, bias = inputs
    y = emit.node("Reshape", [x, emit.constant([0, groups, -1])])
    ones, zeros = (emit.constant(np.full(groups, value), np.float32) for value in (1, 0))
    y = emit.node("InstanceNormalization", [y, ones, zeros], epsilon=epsilon)
    y = emit.node("Reshape", [y, emit.sizes(x, 0, 4)])
    axes = emit.constant([1, 2])
    y = emit.node("Mul", [y, emit.node("Unsqueeze", [weight, axes])])
    return emit.node("Add", [y, emit.node("Unsqueeze", [bias, axes])])


def _upsample_conv(emit: Emitter, inputs: Sequence[ir.Value]) -> ir.Value:
    # Of the nine pixels under the kernel, upsampling leaves at most four different ones: each of the four pixels that
    # one pixel becomes is a 2x2 convolution before the upsampling, with sums of the kernel's values. 4/9 of the work.
    x, weight, *bias = inputs
    kernel = _pairs(emit, _pairs(emit, weight, 2), 3)
    rows = []
    for row in (0, 1):
        pixels = []
        for column in (0, 1):
            starts, ends = [2 * row, 2 * column], [2 * row + 2, 2 * column + 2]
            corner = [emit.constant(value) for value in (starts, ends, [2, 3])]
            part = emit.node("Slice", [kernel, *corner])
            pads = [1 - row, 1 - column, row, column]
            pixel = emit.node("Conv", [x, part, *bias], kernel_shape=[2, 2], pads=pads)
            pixels.append(emit.node("Unsqueeze", [pixel, emit.constant([4])]))
        pair = emit.node("Concat", pixels, axis=4)
        rows.append(emit.node("Reshape", [pair, emit.constant([0, 0, 0, 1, -1])]))
    both = emit.node("Concat", rows, axis=3)
    sides = emit.node("Mul", [emit.sizes(x, 2, 4), emit.constant([2])])
    shape = emit.node("Concat", [emit.constant([0, 0]), sides], axis=0)
    return emit.node("Reshape", [both, shape])


def _pairs(emit: Emitter, kernel: ir.Value, axis: int) -> ir.Value:
    """The three values along `axis` as two pairs: what meets an even and what meets an odd pixel after upsampling."""
    first, middle, last = emit.node("Split", [kernel], 3, axis=axis, num_outputs=3)
    even = [first, emit.node("Add", [middle, last])]
    odd = [emit.node("Add", [first, middle]), last]
    return emit.node("Concat", even + odd, axis=axis)


DIALECT = Dialect("fused", _attention, _group_norm, _upsample_conv)
