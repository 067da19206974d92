"""The `plain` dialect: operators of the ONNX domain only, for providers that compile the graph themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.dialects.lowering import Attention, Dialect, Emitter, resize_conv

# What MultiHeadAttention takes from the scores of padding: `mask_filter_value`.
_FAR = 10000


def _attention(emit: Emitter, call: Attention) -> ir.Value:
    split = emit.constant([0, 0, call.heads, call.width // call.heads])

    def heads(x: ir.Value, perm: list[int]) -> ir.Value:
        return emit.node("Transpose", [emit.node("Reshape", [x, split])], perm=perm)

    q = emit.node("Mul", [heads(call.q, [0, 2, 1, 3]), emit.constant(call.scale, np.float32)])
    scores = emit.node("MatMul", [q, heads(call.k, [0, 2, 3, 1])])
    if call.causal:
        scores = emit.node("Add", [scores, emit.shared(("causal", call.like), lambda: _mask(emit, call.like))])
    if call.valid is not None:
        scores = emit.node("Add", [scores, emit.shared(("bias", call.valid), lambda: _bias(emit, call.valid))])
    y = emit.node("MatMul", [emit.node("Softmax", [scores], axis=-1), heads(call.v, [0, 2, 1, 3])])
    return emit.node("Reshape", [emit.node("Transpose", [y], perm=[0, 2, 1, 3]), emit.constant([0, 0, call.width])])


def _mask(emit: Emitter, ids: ir.Value) -> ir.Value:
    """`[tokens, tokens]`: 0 on and below the diagonal, -inf above."""
    count = emit.node("Squeeze", [emit.sizes(ids, 1, 2), emit.constant([0])])
    index = emit.node("Range", [emit.constant(0), count, emit.constant(1)])
    row = emit.node("Unsqueeze", [index, emit.constant([1])])
    later = emit.node("Greater", [index, row])
    return emit.node("Where", [later, emit.constant(-np.inf, np.float32), emit.constant(0, np.float32)])


def _bias(emit: Emitter, valid: ir.Value) -> ir.Value:
    """`[batch, 1, 1, tokens]`: 0 where a token counts, far below all scores where it is padding."""
    ones = emit.node("Unsqueeze", [emit.node("Cast", [valid], to=ir.DataType.FLOAT.value), emit.constant([1, 2])])
    return emit.node("Mul", [emit.node("Sub", [ones, emit.constant(1, np.float32)]), emit.constant(_FAR, np.float32)])


def _group_norm(emit: Emitter, inputs: Sequence[ir.Value], groups: int, epsilon: float) -> ir.Value:
    return emit.node("GroupNormalization", inputs, num_groups=groups, epsilon=epsilon)


DIALECT = Dialect("plain", _attention, _group_norm, resize_conv)
