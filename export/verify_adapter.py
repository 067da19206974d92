"""Runs the graphs of an adapter and its image encoder against diffusers and transformers with the real weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from export import verify, verify_pictures
from export.graphs import Graph
from export.ip_adapter import ImageEncoder, IpAdapter
from export.models import image_encoder, ip_adapter
from export.verify import Inputs, Reference, Row


def compare(encoder: ImageEncoder | None, adapter: IpAdapter, built: dict[str, dict[str, bytes]]) -> Iterator[Row]:
    """Every graph that was built, in each dialect."""
    with torch.no_grad():
        if encoder is not None and encoder.component in built:
            tensors = verify.load(encoder.files)
            graph = encoder.graph()
            yield from verify.against(graph, built[graph.component], tensors, seen(encoder, tensors), cases(graph, 1))
        tensors = verify.load([adapter.file])
        projection, kv = adapter.graphs()
        count = 1 if encoder is None else encoder.sizes["tokens"]
        references: dict[Graph, Callable[[], Reference]] = {
            projection: lambda: verify_pictures.projection(adapter.sizes.form, tensors),
            kv: lambda: verify_pictures.keys_values(tensors, ip_adapter.numbered(adapter.attentions)),
        }
        for graph, reference in references.items():
            inputs = cases(graph, count if graph is projection else adapter.tokens)
            yield from verify.against(graph, built[graph.component], tensors, reference(), inputs)


def seen(encoder: ImageEncoder, tensors: dict[str, Tensor]) -> Reference:
    """transformers' own forward."""
    # The config may name f16. Files of older libraries hold buffers besides; what is missing has been refused.
    net = image_encoder.build(encoder.config).float()
    net.load_state_dict(tensors, strict=False)

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = net(x["pixel_values"], output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    return run


def cases(graph: Graph, tokens: int) -> list[Inputs]:
    """Sizes and random inputs of batches of one to three."""
    random = torch.Generator().manual_seed(len(graph.component))
    made = []
    for batch in (1, 2, 3):
        sizes = {"batch": batch, "tokens": tokens}
        inputs = {
            port.name: torch.randn([sizes.get(dim, dim) for dim in port.shape], generator=random)
            for port in graph.inputs
        }
        made.append((sizes, inputs))
    return made
