"""The judge of generated pictures, for `tronie bench --quality`: a graph without weights, and its weights.

From Python, `write(network, weights, out)`; from the command line, `python -m export judge`.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export import build, trace
from export import composite as op
from export.errors import ExportError
from export.graphs import Graph, Port

GRAPH = "judge.onnx.gz"
WEIGHTS = "judge.safetensors"
_TOLERANCE = 1e-4


class Judge(nn.Module):
    """`pixel_values [n, 3, side, side]`, levels 0..1 -> `logits [n, choices]`, `embedding [n, width]`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for layer in net.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.forward = functools.partial(op.group_norm, layer)
            elif isinstance(layer, nn.GELU):
                layer.forward = functools.partial(op.gelu, approximate=layer.approximate)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As the network's own; its norms of groups and GELUs are the nodes that dialects lower."""
        return self.net(pixel_values)


def write(
    network: Callable[[], nn.Module],
    weights: Mapping[str, Tensor],
    out: Path,
    side: int = 128,
) -> None:
    """Writes both files into the folder `out`. What `network` builds gives logits and embedding of pixel values."""
    net = network().eval()
    # Counts of batches say nothing about pictures.
    own = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    if missing := sorted(own.keys() ^ {name for name in weights if not name.endswith("num_batches_tracked")}):
        raise ExportError(f"judge: weights and network differ in {', '.join(missing)}")
    if wrong := [name for name, tensor in own.items() if tensor.shape != weights[name].shape]:
        raise ExportError(f"judge: weights and network differ in the shape of {', '.join(wrong)}")
    kept = {name: weights[name].detach().float().contiguous().clone() for name in own}
    net.load_state_dict(kept, strict=False)
    logits, embedding = _shown(net, side)
    ports = (Port("logits", ("batch", logits)), Port("embedding", ("batch", embedding)))
    inputs = (Port("pixel_values", ("batch", 3, side, side)),)
    graph = Graph("judge", "judge", inputs, ports, lambda: Judge(network().eval()), _TOLERANCE)
    lowered = build.one(graph, ["fused"], lambda name, _shape: name)["fused"]
    # Some weights become part of others on the way into the graph, or none: the file has what the graph asks for.
    wanted = trace.initializers(lowered)
    if strange := sorted(wanted.keys() - kept.keys()):
        raise ExportError(f"judge: the graph asks for {', '.join(strange)}, which are no weights of the network")
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: kept[name] for name in wanted}, out / WEIGHTS, {"format": "pt"})
    (out / GRAPH).write_bytes(trace.compress(lowered))
    _compare(net, gzip.decompress((out / GRAPH).read_bytes()), kept, side)


def _shown(net: nn.Module, side: int) -> tuple[int, int]:
    """Widths of logits and embedding."""
    with torch.no_grad():
        given = net(torch.rand(2, 3, side, side))
    if not isinstance(given, tuple) or [tensor.dim() for tensor in given] != [2, 2]:
        raise ExportError("judge: forward(pixel_values) must give logits [n, choices] and embedding [n, width]")
    logits, embedding = given
    if not torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-4):
        raise ExportError("judge: its embedding must have unit length")
    return logits.shape[1], embedding.shape[1]


def _compare(net: nn.Module, graph: bytes, weights: Mapping[str, Tensor], side: int) -> None:
    from export import verify

    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(pixels)
    session = verify.open_session(graph, dict(weights))
    names = ("logits", "embedding")
    found = session.run(names, verify.fed(session, {"pixel_values": pixels}))
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        off = verify.relative_error(ours, theirs.numpy())
        print(f"judge: {name} within {off:.1e} of torch")
        if off > _TOLERANCE:
            raise ExportError(f"judge: {name} differs from torch's by {off:.1e} of the largest; at most {_TOLERANCE}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    module, _, name = args.network.partition(":")
    try:
        network = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExportError(f"{args.network}: is no MODULE:CLASS that can be imported: {error}") from error
    if not args.weights.is_file():
        raise ExportError(f"{args.weights}: no such file")
    write(network, load_file(args.weights), args.out, args.side)
    return 0
