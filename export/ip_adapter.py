"""Reads IP-Adapters and their image encoders into the graphs to trace and the facts for the catalogue."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from export import adapter_lora, graphs, hub
from export.errors import ExportError
from export.graphs import Graph
from export.models import image_encoder, ip_adapter
from export.models.ip_adapter import Projection, Shapes
from export.source import Declared, File, Folder, Hub, Source, located, read_header, tensors_of

# CLIP's own, as `CLIPImageProcessor` has them, for folders without a preprocessor_config.json.
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
_PROJECTION, _LAYERS = "image_proj.", "ip_adapter."
_LAYER = re.compile(r"ip_adapter\.\d+\.to_[kv]_ip\.weight")
# What each form reads of its encoder: a key of `image_encoder.sizes`.
_READS = {"base": "projection", "plus": "width", "full": "width", "faceid-plusv2": "width"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ImageEncoder:
    """An image encoder as the catalogue needs it; `folder` is where it lies in its source."""

    component: str
    source: Source
    folder: str
    config: dict
    files: list[File]
    mean: list[float]
    std: list[float]

    @property
    def sizes(self) -> dict[str, int]:
        """Edge of the picture, tokens, their width, width of the projection."""
        return image_encoder.sizes(self.config)

    def graph(self) -> Graph:
        """Its declaration."""
        return graphs.image_encoder(
            self.component, self.sizes, lambda: image_encoder.ImageEncoder(image_encoder.build(self.config))
        )

    def rule(self) -> dict:
        """The catalogue's `image_encoders` entry: how a picture becomes pixel values."""
        return {"size": self.sizes["size"], "mean": self.mean, "std": self.std}

    def resolve(self) -> Callable[[str, tuple[int, ...]], str]:
        """Finds tensors in its files."""
        header = self.source.header(self.folder)

        def find(name: str, shape: tuple[int, ...]) -> str:
            if header is not None and header.get(name) != shape:
                found = f"has shape {list(header[name])}" if name in header else "is missing"
                raise ExportError(
                    f"{self.source.origin}: {self.folder}: tensor {name} {found}, but config.json makes it "
                    f"{list(shape)}; config.json and weights do not belong together"
                )
            return name

        return find


@dataclass(frozen=True)
class IpAdapter:
    """An adapter as the catalogue needs it; `attentions` are those of the model that it is for."""

    name: str
    origin: str
    file: File
    sizes: Projection
    attentions: list[dict]
    encoder: str | None
    tokens: int

    def graphs(self) -> list[Graph]:
        """Its projection, and its keys and values."""
        context, layers = self.sizes.context, ip_adapter.numbered(self.attentions)
        counts = {width: len(numbers) for width, numbers in layers.items()}
        return [
            graphs.projection(self.name, self.sizes.inputs, self.sizes.output, lambda: ip_adapter.Tokens(self.sizes)),
            graphs.adapter_kv(self.name, context, counts, lambda: ip_adapter.KeysValues(context, self.attentions)),
        ]

    def entry(self) -> dict:
        """The catalogue's `adapters` entry."""
        entry = {"kind": "ip-adapter", "form": self.sizes.form, "origin": self.origin}
        seen = {} if self.encoder is None else {"image_encoder": self.encoder}
        face = {"identity": self.sizes.identity} if self.sizes.identity else {}
        return {**entry, **seen, **face, "tokens": self.tokens}


def open_encoder(component: str, text: str, revision: str | None = None) -> ImageEncoder:
    """`--image-encoder`: a folder, or `owner/name:folder` of a hub repository."""
    path = Path(text)
    if path.is_dir():
        source: Source = Folder(path.absolute().parent)
        folder = path.absolute().name
    elif (place := _hub_place(text)) is not None:
        repo, folder = place
        source = Hub(repo, hub.listing(repo, revision), revision=revision)
    else:
        raise ExportError(f"--image-encoder {text}: no such folder; give a folder or owner/name:folder of the hub")
    return read_encoder(component, source, folder.strip("/"))


def read_encoder(component: str, source: Source, folder: str) -> ImageEncoder:
    """An image encoder in a folder of a source."""
    config = source.json(f"{folder}/config.json")
    image_encoder.check(folder, config)
    name = f"{folder}/preprocessor_config.json"
    rule = source.json(name) if name in source.files else {}
    mean, std = (
        [float(v) for v in rule.get(key, usual)] for key, usual in (("image_mean", _MEAN), ("image_std", _STD))
    )
    return ImageEncoder(component, source, folder, config, source.weights(folder), mean, std)


def _hub_place(text: str) -> tuple[str, str] | None:
    repo, colon, path = text.partition(":")
    return (repo, path) if colon and path and repo.count("/") == 1 and not repo.startswith((".", "/", "~")) else None


def open_file(text: str, revision: str | None, root: Path) -> tuple[str, File, Shapes]:
    """SOURCE of `adapter`: its origin for the catalogue, the file, names and shapes of its tensors."""
    if text.endswith(_PICKLES):
        raise ExportError(_pickled(text))
    path = Path(text)
    if path.is_dir():
        path = _only_file(path)
    if path.is_file():
        if revision is not None:
            raise ExportError(f"--revision {revision}: {text} is on this machine and has none; leave it out")
        return located(path, root), File(path.name, path=path.absolute()), read_header(path)
    place = _hub_place(text)
    if place is None:
        raise ExportError(
            f"{text}: no such file; SOURCE is a .safetensors file, a folder with one, or owner/name:path of the hub"
        )
    repo, name = place
    header = tensors_of(f"{repo}: {name}", hub.header(repo, name, revision))
    return repo, File(name, repo=repo, revision=revision), header


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ExportError(f"{folder}: has {', '.join(path.name for path in found)}; name one of them")
    pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES), None)
    if pickled is not None:
        raise ExportError(_pickled(str(pickled)))
    raise ExportError(f"{folder}: has no .safetensors file")


def _pickled(name: str) -> str:
    code = (
        "import torch, safetensors.torch as s; d = torch.load('IN', map_location='cpu', weights_only=True); "
        "s.save_file({a + '.' + b: t.contiguous() for a, p in d.items() for b, t in p.items()}, 'OUT.safetensors')"
    )
    return f'{name}: pickled weights are not read; convert it first: python -c "{code}"'


def recognise(name: str, shapes: Shapes, *, lora: bool = False) -> Projection:
    """The form of an adapter's file, by its tensors. Refuses what belongs to no form, and a LoRA unless it is kept."""
    for tensor in sorted(shapes):
        if adapter_lora.is_lora(tensor):
            if not lora:
                raise ExportError(
                    f"{name}: holds a LoRA beside the adapter ({tensor}), as FaceID files do, and that would be lost; "
                    "have it written to a file with --lora-out FILE.safetensors, and give that to `tronie generate "
                    "--lora` whenever the adapter is used"
                )
            continue
        if not tensor.startswith(_PROJECTION) and not _LAYER.fullmatch(tensor):
            raise ExportError(
                f"{name}: tensor {tensor} is unknown; an IP-Adapter has image_proj.* and "
                "ip_adapter.N.to_k_ip.weight, ip_adapter.N.to_v_ip.weight"
            )
    mine = {key.removeprefix(_PROJECTION): shape for key, shape in shapes.items() if key.startswith(_PROJECTION)}
    try:
        sizes = ip_adapter.recognise(mine)
    except (ExportError, ValueError) as error:
        raise ExportError(f"{name}: {error}") from error
    wanted = projection_shapes(sizes)
    for key in sorted(wanted.keys() | mine.keys()):
        if wanted.get(key) != mine.get(key):
            have = f"has shape {list(mine[key])}" if key in mine else "is missing"
            want = f"must be {list(wanted[key])}" if key in wanted else "is unknown"
            raise ExportError(f"{name}: tensor {_PROJECTION}{key} {have}; in the form {sizes.form} it {want}")
    return sizes


def projection_shapes(sizes: Projection) -> dict[str, tuple[int, ...]]:
    """Names below `image_proj.` and shapes that a projection has."""
    with FakeTensorMode():
        return {name: tuple(tensor.shape) for name, tensor in sizes.build().state_dict().items()}


def layer_shapes(context: int, attentions: list[dict]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the keys' and values' projections of every cross-attention."""
    return {
        f"{_LAYERS}{number}.to_{side}_ip.weight": (width, context)
        for width, numbers in ip_adapter.numbered(attentions).items()
        for number in numbers
        for side in "kv"
    }


def check_model(name: str, shapes: Shapes, sizes: Projection, model: str, unet: dict) -> None:
    """Refuses an adapter that was trained for another model's UNet; `unet` is the entry's section."""
    context = unet["cross_attention_dim"]
    if sizes.context != context:
        family = {768: " (Stable Diffusion 1.5)", 1024: " (Stable Diffusion 2)", 2048: " (SDXL)"}.get(sizes.context, "")
        raise ExportError(
            f"{name}: its tokens have width {sizes.context}{family}, but the UNet of {model} takes {context}; take the "
            "adapter that was made for this model"
        )
    wanted = layer_shapes(context, unet["attentions"])
    layers = {key: shape for key, shape in shapes.items() if _LAYER.fullmatch(key)}
    for key in sorted(wanted.keys() | layers.keys(), key=_number):
        if wanted.get(key) != layers.get(key):
            have = f"has shape {list(layers[key])}" if key in layers else "is missing"
            want = f"must be {list(wanted[key])}" if key in wanted else "does not exist"
            raise ExportError(
                f"{name}: tensor {key} {have}, but for the UNet of {model} it {want}; take the adapter that was made "
                "for this model"
            )


def _number(key: str) -> tuple[int, str]:
    return int(key.split(".")[1]), key


def check_encoder(name: str, sizes: Projection, encoder: ImageEncoder | None) -> None:
    """Refuses an image encoder that gives another width than the adapter reads, or one too many or too few."""
    key = _READS.get(sizes.form)
    if key is None:
        if encoder is not None:
            raise ExportError(f"{name}: of the form {sizes.form}, which sees no pictures; leave --image-encoder out")
        return
    if encoder is None:
        raise ExportError(f"{name}: of the form {sizes.form}, which needs --image-encoder")
    if (gives := encoder.sizes[key]) != sizes.image:
        output = {"projection": "image_embeds", "width": "hidden_states"}[key]
        known = (
            {1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}
            if key == "projection"
            else {
                1280: "OpenCLIP ViT-H/14",
                1664: "OpenCLIP ViT-bigG/14",
            }
        )
        right = f" ({known[sizes.image]}'s)" if sizes.image in known else ""
        raise ExportError(
            f"{name}: reads {output} of width {sizes.image}{right}, but those of the image encoder {encoder.folder} "
            f"have {gives}; name the folder of the encoder that the adapter was trained with"
        )


def token_count(sizes: Projection, encoder: ImageEncoder | None) -> int:
    """How many tokens a picture becomes."""
    return sizes.tokens or encoder.sizes["tokens"]


def declared(folder: Path, attentions: list[dict]) -> tuple[list[ImageEncoder], list[IpAdapter]]:
    """The published adapters of a model whose configs come with this program; none where none are described."""
    if not (folder / "adapters").is_dir():
        return [], []
    source = Declared(folder / "adapters")
    places: dict[str, str] = source.facts["image_encoders"]
    encoders = [read_encoder(component, source, place) for component, place in places.items()]
    by_name = {encoder.component: encoder for encoder in encoders}
    adapters = []
    for name, about in source.facts["adapters"].items():
        sizes, encoder = Projection(**about["projection"]), by_name[about["image_encoder"]]
        check_encoder(name, sizes, encoder)
        tokens = token_count(sizes, encoder)
        file = source.file(about["file"])
        adapters.append(IpAdapter(name, source.origin, file, sizes, attentions, encoder.component, tokens))
    return encoders, adapters
