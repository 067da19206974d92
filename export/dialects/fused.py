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
    return emit.node("MultiHeadAttention", [call.q, call.k, call.v], domain="com.microsoft", **attrs)


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


DIALECT = Dialect("fused", _attention, _group_norm)
