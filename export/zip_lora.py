"""Two LoRAs in one pipeline with a merger for every input column of their attention layers, and the files of both.

ZipLoRA, Shah et al. 2023 (arXiv 2311.13600): a layer's update is `dW_c diag(m_c) + dW_s diag(m_s)`. Scaling a column of
`B A` scales that column of `A`, so the merged model is an ordinary LoRA of the ranks' sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export.errors import ExportError

CONTENT, STYLE = "content", "style"
BOTH = (CONTENT, STYLE)
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_ATTENTION = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
# What saves them may put the network's name in front once or twice.
_MERGER = re.compile(r"^(?:unet\.)*(?P<layer>.+?)\.(?:lora|lora_layer)\.merger_(?P<place>[12])$")
_MERGED = re.compile(r"^(?:unet\.)*(?P<layer>.+?)\.lora\.weight$")
# The merged update of a file in 16 bits, against one worked out here.
_ALIKE = 0.02


class Zip:
    """An SDXL pipeline with a content and a style LoRA, and their mergers (`[in]`, ones at first) by UNet layer."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, content: Path, style: Path) -> None:
        if content.resolve() == style.resolve():
            raise ExportError(f"--style {style}: is --content too; a LoRA merged with itself is that LoRA")
        self.pipeline = pipeline
        for name, path in ((CONTENT, content), (STYLE, style)):
            _load(pipeline, name, path)
        self.layers = dict(self._layers())
        self.mergers: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._merging = False
        device = pipeline.unet.device
        for key, layer in self.layers.items():
            component, _, name = key.partition(".")
            if component == "unet" and _ATTENTION.search(name) and all(side in layer.lora_A for side in BOTH):
                ones = torch.ones(layer.in_features, device=device)
                self.mergers[name] = (nn.Parameter(ones.clone()), nn.Parameter(ones.clone()))
                for place, side in enumerate(BOTH):
                    layer.lora_A[side].register_forward_pre_hook(self._scale(name, place))
        if not self.mergers:
            raise ExportError(
                f"{content} and {style} change no attention layer of the UNet both, so there is nothing to zip; "
                "use them side by side"
            )

    def _layers(self) -> Iterator[tuple[str, LoraLayer]]:
        for component in _COMPONENTS:
            net = getattr(self.pipeline, component)
            for name, layer in net.named_modules() if net is not None else ():
                if isinstance(layer, LoraLayer):
                    if any(layer.use_dora.values()):
                        raise ExportError(
                            f"{component}.{name}: has a DoRA magnitude, which columns cannot be scaled of"
                        )
                    yield f"{component}.{name}", layer

    def _scale(self, name: str, place: int):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if not self._merging:
                return None
            (x,) = inputs
            return (x * self.mergers[name][place].to(x.dtype),)

        return hook

    @contextmanager
    def only(self, *sides: str) -> Iterator[None]:
        """The model with these LoRAs: one, none for the base model, or both with their mergers."""
        _use(self.pipeline, sides)
        self._merging = len(sides) == len(BOTH)
        try:
            yield
        finally:
            self._merging = False

    def update(self, name: str, side: str) -> Tensor:
        """A UNet layer's `alpha/r B A`, `[out, in]`, without merger."""
        up, down = _factors(self.layers[f"unet.{name}"], side)
        return up @ down

    def similarity(self) -> Tensor:
        """The sum over layers of the mean of |m_c m_s|."""
        return torch.stack([(content * style).abs().mean() for content, style in self.mergers.values()]).sum()

    def save(self, path: Path) -> None:
        """The merged model as a LoRA in PEFT's names: columns scaled in attention, plain sums in all other layers."""
        tensors = {}
        for key, layer in self.layers.items():
            component, _, name = key.partition(".")
            sides = [side for side in BOTH if side in layer.lora_A]
            pairs = [_factors(layer, side, flat=False) for side in sides]
            ups, downs = [up for up, _ in pairs], [down for _, down in pairs]
            if component == "unet" and name in self.mergers:
                scales = [self.mergers[name][BOTH.index(side)].detach().float().cpu() for side in sides]
                downs = [down * scale for down, scale in zip(downs, scales, strict=True)]
            tensors[f"{key}.lora_A.weight"] = torch.cat(downs, 0).contiguous()
            tensors[f"{key}.lora_B.weight"] = torch.cat(ups, 1).contiguous()
        _save(tensors, path)

    def save_mergers(self, path: Path) -> None:
        """The mergers in the names of ziplora-pytorch's layers."""
        pairs = {
            f"unet.{name}.lora.merger_{place}": merger.detach().float().cpu()
            for name, mergers in self.mergers.items()
            for place, merger in enumerate(mergers, 1)
        }
        _save(pairs, path)

    def load_mergers(self, path: Path) -> None:
        """Mergers out of a file: written by `save_mergers`, or the merged updates that ziplora-pytorch saves.

        The latter has one weight a layer, `m_1 W_1 + m_2 W_2` column by column, of which the mergers are worked out.
        """
        tensors = _read(path)
        found: dict[str, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            if match := _MERGER.match(key):
                found.setdefault(match["layer"], {})[int(match["place"])] = tensor.float()
            elif match := _MERGED.match(key):
                found[match["layer"]] = dict(enumerate(self._split(path, match["layer"], tensor.float()), 1))
            else:
                raise ExportError(f"{path}: {key!r} is neither a merger nor a merged update of ziplora-pytorch")
        missing = sorted(self.mergers.keys() ^ found.keys())
        if missing:
            raise ExportError(f"{path}: has mergers of other layers than the two LoRAs, such as {missing[0]}")
        for name, places in found.items():
            for place, merger in enumerate(self.mergers[name], 1):
                if place not in places or places[place].shape != merger.shape or not places[place].isfinite().all():
                    raise ExportError(f"{path}: {name}: merger_{place} is not {merger.numel()} finite numbers")
                merger.data = places[place].to(merger.device)

    def _split(self, path: Path, name: str, merged: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.mergers:
            raise ExportError(f"{path}: {name} is not a layer that both LoRAs change")
        content, style = (self.update(name, side).double() for side in BOTH)
        if merged.shape != content.shape:
            raise ExportError(f"{path}: {name} is {list(merged.shape)}, and the LoRAs' update {list(content.shape)}")
        merged = merged.double()
        columns = torch.stack([content, style], -1).transpose(0, 1)
        mergers = torch.linalg.lstsq(columns, merged.T.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        rest = (columns @ mergers.unsqueeze(-1)).squeeze(-1).T - merged
        if not rest.norm() <= _ALIKE * merged.norm():
            raise ExportError(f"{path}: {name} was not made of these two LoRAs")
        return mergers[:, 0].float(), mergers[:, 1].float()


def _load(pipeline: StableDiffusionXLPipeline, name: str, path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"--{name} {path}: is not there")
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise ExportError(f"--{name} {path}: is not a LoRA of this model: {error}") from error
    nets = [getattr(pipeline, component) for component in _COMPONENTS]
    held = [p for net in nets if net is not None for n, p in net.named_parameters() if f".{name}." in n]
    if not held:
        raise ExportError(f"--{name} {path}: holds nothing that this model has")
    if not all(p.isfinite().all() for p in held):
        raise ExportError(f"--{name} {path}: holds numbers that are not finite")


def _use(pipeline: StableDiffusionXLPipeline, sides: tuple[str, ...]) -> None:
    if sides:
        pipeline.enable_lora()
        pipeline.set_adapters(list(sides))
    else:
        pipeline.disable_lora()
    for component in _COMPONENTS:
        net = getattr(pipeline, component)
        if net is not None:
            net.requires_grad_(False)


def _factors(layer: LoraLayer, side: str, flat: bool = True) -> tuple[Tensor, Tensor]:
    """`alpha/r B` and `A` in f32."""
    up, down = layer.lora_B[side], layer.lora_A[side]
    if up.bias is not None:
        raise ExportError("a LoRA with a bias of its own cannot be merged")
    pair = up.weight.detach().float().cpu() * layer.scaling[side], down.weight.detach().float().cpu()
    return tuple(part.flatten(1) for part in pair) if flat else pair


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: is not a safetensors file: {error}") from error


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
