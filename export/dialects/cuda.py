"""The `cuda` dialect: channels-last, f16, and the fused operators that only ONNX Runtime's CUDA provider has.

What its kernels take, as onnxruntime's source says (paths below `onnxruntime/`) and the messages of the 1.31.1 library:

GroupNorm, SkipGroupNorm (`contrib_ops/cuda/diffusion/group_norm*`)
    four axes, channels last; gamma and beta f32; groups as `group_norm` says; a skip of x's shape or
    `[batch, 1, 1, channels]`.
BiasSplitGelu (`contrib_ops/cuda/diffusion/bias_split_gelu*`)
    three axes, a bias, a width of `SPLIT_GELU`.
SkipLayerNormalization (`contrib_ops/cuda/bert/skip_layer_norm*`)
    two or three axes, a skip of x's shape; sums in f32 only with `enable_skip_layer_norm_strict_mode`.
MultiHeadAttention (`contrib_ops/cuda/bert/multihead_attention.cc`)
    `[batch, tokens, width]` thrice; flash kernels for f16 and heads of up to 256, memory-efficient ones beyond.
Conv with `prefer_nhwc` (`core/providers/cuda/nn/conv.cc`)
    weights that are initializers and get prepacked: with `session.disable_prepacking` they are read in a layout that
    they do not have.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from export.dialects import fused, fusions, half, layout
from export.dialects.lowering import Dialect, Emitter, drop_unused, resize_conv

SPLIT_GELU = (2560, 5120, 6144, 10240, 12288)

# Channels that a block of the GroupNorm kernel can hold.
_BLOCKS = (128, 256, 320, 384, 512)


def group_norm(channels: int, groups: int) -> bool:
    """Whether the kernel takes this norm: threads read two channels of a group, blocks hold whole groups."""
    if channels % groups or (channels // groups) % 2:
        return False
    return channels // groups <= max(_BLOCKS)


def split_gelu(width: int) -> bool:
    """Whether there is a kernel for this width (value and gate together)."""
    return width in SPLIT_GELU


def _group_norm(emit: Emitter, inputs: Sequence[ir.Value], groups: int, epsilon: float) -> ir.Value:
    if not group_norm(int(inputs[1].shape[0]), groups):
        return fused.DIALECT.group_norm(emit, inputs, groups, epsilon)
    # Channels-first until `layout` has passed.
    attrs = {"activation": 0, "channels_last": 1, "groups": groups, "epsilon": epsilon}
    return emit.node("GroupNorm", inputs, domain=fusions.MICROSOFT, **attrs)


def _fold_casts(graph: ir.Graph) -> None:
    """Constants that are cast to what they are, as the trace of `clamp` has them."""
    for node in list(graph):
        if node.op_type == "CastLike" and node.inputs[0].is_initializer():
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


class _Cuda(Dialect):
    def finish(self, model: ir.Model, ports: Collection[str] | None) -> None:
        emit = Emitter(model.graph)
        emit.adopt_constants()
        _fold_casts(model.graph)
        layout.to_channels_last(emit)
        drop_unused(model.graph)
        fusions.fuse(emit, split_gelu)
        if ports is not None:
            half.narrow(emit, ports)


DIALECT = _Cuda("cuda", fused.DIALECT.attention, _group_norm, resize_conv)
