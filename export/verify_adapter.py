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
        references: dict[Graph, Callable[[], Reference]] = {
            projection: lambda: verify_pictures.projection(adapter.sizes.form, tensors),
            kv: lambda: verify_pictures.keys_values(tensors, ip_adapter.numbered(adapter.attentions)),
        }
        for graph, reference in references.items():
            inputs = pictured(graph, encoder) if graph is projection else cases(graph, adapter.tokens)
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


def pictured(graph: Graph, encoder: ImageEncoder | None) -> list[Inputs]:
    """Random inputs, of which an encoder's are what it sees in pictures of noise.

    A trained projection amplifies numbers that no encoder makes more than f16 bears.
    """
    if encoder is None:
        return cases(graph, 1)
    see, made = seen(encoder, verify.load(encoder.files)), cases(graph, encoder.sizes["tokens"])
    for (_, inputs), (_, pictures) in zip(made, cases(encoder.graph(), 1), strict=True):
        found = dict(zip(("image_embeds", "hidden_states"), see(pictures), strict=True))
        inputs.update({name: found[name] for name in inputs.keys() & found.keys()})
    return made


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
