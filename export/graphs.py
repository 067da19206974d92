"""Declares each graph: inputs, outputs, dynamic axes, example sizes for tracing, tolerance of its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

# Sizes to trace with: all different and none 0 or 1, so that no two axes are taken for one another.
TRACE_SIZES = {"batch": 2, "tokens": 7, "height": 24, "width": 40, "Height": 192, "Width": 320}

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
