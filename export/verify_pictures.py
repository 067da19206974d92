"""References for the networks of image prompts: diffusers' own processors, projections and transformers' encoder."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from export.graphs import Graph
from export.models import unet

# Sources and tokens of the longest, by the number of pictures painted at once.
_SOURCES = {1: (1, 4), 2: (3, 17), 3: (2, 257)}
_AREA = "image_area_"


def sizes(graph: Graph, others: dict[str, int]) -> dict[str, int]:
    """Sizes of the axes that only pictures bring, to those of the rest."""
    sources, tokens = _SOURCES[others["batch"]]
    found = {"sources": sources, "image_tokens": tokens}
    for port in graph.inputs:
        if port.name.startswith(_AREA):
            factor = int(port.name.removeprefix(_AREA))
            found[port.shape[1]] = ceil(others["height"] / factor) * ceil(others["width"] / factor)
    return found


def inputs(given: dict[str, Tensor], sizes: dict[str, int], random: torch.Generator) -> dict[str, Tensor]:
    """Valid tokens and areas instead of the random ones given, and the masks that the areas come from."""
    if "image_valid" not in given:
        return {}
    sources, tokens = given["image_valid"].shape
    counts = [tokens, *(1 + (tokens // 2 + 3 * i) % tokens for i in range(sources - 1))]
    valid = torch.stack([(torch.arange(tokens) < count).long() for count in counts])
    shape = (sources, 1, 1, 4 * sizes["height"], 4 * sizes["width"])
    masks = (torch.rand(shape, generator=random) > 0.3).float()
    masks[0] = 1
    new = {"image_valid": valid, "masks": masks}
    for name, area in given.items():
        if name.startswith(_AREA):
            new[name] = torch.stack([_area(mask, area.shape[1]) for mask in masks])
    return new


def _area(mask: Tensor, positions: int) -> Tensor:
    return IPAdapterMaskProcessor.downsample(mask[0], 1, positions, 1)[0, :, 0]


class _Given(nn.Module):
    """A projection whose result is known beforehand."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result


def denoiser(net: UNet2DConditionModel) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """diffusers' UNet with `IPAdapterAttnProcessor2_0` in every cross-attention, keys and values as given."""
    widths = unet.kv_layers(net)

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        counts = x["image_valid"].sum(dim=1).tolist()
        for width, layers in widths.items():
            text, pictures = x[f"text_kv_{width}"], x[f"image_kv_{width}"]
            for i, (_, attn) in enumerate(layers):
                attn.to_k, attn.to_v = _Given(text[2 * i]), _Given(text[2 * i + 1])
                processor = IPAdapterAttnProcessor2_0(width, 1, num_tokens=counts)
                for side, packed in (("to_k_ip", pictures[2 * i]), ("to_v_ip", pictures[2 * i + 1])):
                    given = [_Given(packed[:, source, :count]) for source, count in enumerate(counts)]
                    setattr(processor, side, nn.ModuleList(given))
                attn.set_processor(processor)
        unused = torch.zeros(x["sample"].shape[0], 1, 1)
        added = {"text_embeds": x["text_embeds"], "time_ids": x["time_ids"]}
        told = (unused, [unused[:, None] for _ in counts])
        masks = {"ip_adapter_masks": list(x["masks"])}
        out = net(x["sample"], x["timestep"], told, added_cond_kwargs=added, cross_attention_kwargs=masks)
        return (out.sample,)

    return run


def projection(form: str, tensors: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """What diffusers makes of a file's projection; `tensors` has the names in the file."""
    start = "image_proj."
    state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    # A method only by its place.
    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    net = convert(None, state, low_cpu_mem_usage=False).eval()

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if form != "faceid-plusv2":
            return (net(*x.values()),)
        net.clip_embeds, net.shortcut = x["hidden_states"][:, None], True
        net.shortcut_scale = x["shortcut_scale"]
        return (net(x["id_embeds"]),)

    return run


def keys_values(
    tensors: dict[str, Tensor], widths: dict[int, list[int]]
) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """Each layer's two products, stacked; `widths` are the numbers of the layers."""

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        context = x["encoder_hidden_states"]
        return tuple(
            torch.stack(
                [context @ tensors[f"ip_adapter.{number}.to_{side}_ip.weight"].T for number in numbers for side in "kv"]
            )
            for numbers in widths.values()
        )

    return run
