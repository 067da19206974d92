"""Declares each graph: inputs, outputs, dynamic axes, example sizes for tracing, tolerance of its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

# Sizes to trace with: all different and none 0 or 1, so that no two axes are taken for one another.
TRACE_SIZES = {"batch": 2, "tokens": 7, "height": 24, "width": 40, "Height": 192, "Width": 320}
TRACE_SIZES |= {"sources": 3, "image_tokens": 5}
TRACE_SIZES |= {f"area_{2**n}": 24 * 40 >> 2 * n for n in range(4)}

Dim = int | str


@dataclass(frozen=True)
class Port:
    """An input or output; a string in `shape` names a dynamic axis. `kind` is f32 or i64.

    A `narrow` port is f16 in dialects that compute in f16: it leads from one network to another, on the device.
    """

    name: str
    shape: tuple[Dim, ...]
    kind: str = "f32"
    narrow: bool = False


@dataclass(frozen=True)
class Graph:
    """One component's graph before it is traced."""

    component: str
    weights: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    # Builds the network without weights; runs where tensors are fake.
    build: Callable[[], nn.Module]
    # Largest |onnx - torch| over largest |torch| that the check accepts.
    tolerance: float
    # Module parameter name -> name in a checkpoint that follows the hub's convention.
    rename: Callable[[str], str] = field(default=lambda name: name)
    # Whether f16 is enough for it, in dialects that compute in f16.
    half: bool = True


def hub_text_name(name: str) -> str:
    """A text encoder's tensor as the hub names it: transformers 5 leaves `text_model.` out of CLIPTextModel's names."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def text_encoder(component: str, width: int, projection: int | None, build: Callable[[], nn.Module]) -> Graph:
    """A CLIP text encoder; `projection` is its width when it has one."""
    outputs = (Port("hidden_states", ("batch", "tokens", width)),)
    if projection is not None:
        outputs += (Port("text_embeds", ("batch", projection)),)

    inputs = (Port("input_ids", ("batch", "tokens"), "i64"),)
    return Graph(component, component, inputs, outputs, build, 2e-5, hub_text_name)


def _packed(layers: dict[int, int]) -> tuple[Port, ...]:
    return tuple(Port(f"text_kv_{w}", (2 * n, "batch", "tokens", w), narrow=True) for w, n in layers.items())


def kv(context: int, layers: dict[int, int], build: Callable[[], nn.Module]) -> Graph:
    """All cross-attention keys and values; `layers` counts them by width."""
    inputs = (Port("encoder_hidden_states", ("batch", "tokens", context)),)
    return Graph("kv", "unet", inputs, _packed(layers), build, 1e-5)


def unet(facts: dict, build: Callable[[], nn.Module]) -> Graph:
    """The denoiser; `facts` is the `unet` section of the catalogue entry, plus `out_channels`."""
    inputs = (
        Port("sample", ("batch", facts["in_channels"], "height", "width")),
        Port("timestep", (1,)),
        Port("text_embeds", ("batch", facts["pooled_dim"])),
        Port("time_ids", ("batch", facts["time_ids"])),
        *_packed(facts["kv"]),
    )
    outputs = (Port("out_sample", ("batch", facts["out_channels"], "height", "width")),)
    return Graph("unet", "unet", inputs, outputs, build, 2e-5)


def unet_image(facts: dict, build: Callable[[], nn.Module]) -> Graph:
    """The denoiser that also sees pictures: `sources` of them, each with up to `image_tokens` tokens."""
    packed = tuple(
        Port(f"image_kv_{w}", (2 * n, "batch", "sources", "image_tokens", w), narrow=True)
        for w, n in facts["kv"].items()
    )
    factors = sorted({attention["factor"] for attention in facts["attentions"]})
    areas = tuple(Port(f"image_area_{f}", ("sources", f"area_{f}")) for f in factors)
    valid = Port("image_valid", ("sources", "image_tokens"), "i64")
    plain = unet(facts, build)
    return replace(plain, component="unet_image", inputs=(*plain.inputs, *packed, valid, *areas))


def image_encoder(component: str, sizes: dict[str, int], build: Callable[[], nn.Module]) -> Graph:
    """What sees pictures for image prompts; `sizes` has the picture's `size`, `tokens`, `width` and `projection`."""
    inputs = (Port("pixel_values", ("batch", 3, sizes["size"], sizes["size"])),)
    hidden = Port("hidden_states", ("batch", sizes["tokens"], sizes["width"]))
    outputs = (Port("image_embeds", ("batch", sizes["projection"])), hidden)
    return Graph(component, component, inputs, outputs, build, 2e-5)


def projection(
    adapter: str, inputs: tuple[Port, ...], tokens: tuple[Dim, int], build: Callable[[], nn.Module]
) -> Graph:
    """An adapter's `tokens` for the UNet, their number and width, from what its encoder saw."""
    outputs = (Port("ip_hidden_states", ("batch", *tokens)),)
    return Graph(f"{adapter}.projection", adapter, inputs, outputs, build, 2e-5)


def adapter_kv(adapter: str, context: int, layers: dict[int, int], build: Callable[[], nn.Module]) -> Graph:
    """An adapter's keys and values; its ports are those of `kv`."""
    return replace(kv(context, layers, build), component=f"{adapter}.kv", weights=adapter)


def vae_decoder(channels: int, build: Callable[[], nn.Module], half: bool) -> Graph:
    """Latents to pictures; `half` unless its activations overflow in f16."""
    inputs = (Port("latent_sample", ("batch", channels, "height", "width")),)
    outputs = (Port("sample", ("batch", 3, "Height", "Width")),)
    return Graph("vae_decoder", "vae", inputs, outputs, build, 2e-5, half=half)


def vae_encoder(channels: int, build: Callable[[], nn.Module], half: bool) -> Graph:
    """Pictures to the moments of their latents; `half` unless its activations overflow in f16."""
    shape = ("batch", channels, "height", "width")
    inputs = (Port("sample", ("batch", 3, "Height", "Width")),)
    return Graph("vae_encoder", "vae", inputs, (Port("mean", shape), Port("logvar", shape)), build, 2e-5, half=half)
