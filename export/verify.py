"""Runs every graph in ONNX Runtime against torch with the real weights, at several shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_file

from export import emulate, hub, trace, verify_pictures
from export.graphs import Graph
from export.models import text_encoder, unet
from export.sdxl import Checkpoint
from export.source import File

# batch, tokens, height and width of the latents, as multiples and odd sizes alike
SHAPES = (
    {"batch": 1, "tokens": 77, "height": 16, "width": 16},
    {"batch": 2, "tokens": 1, "height": 13, "width": 20},
    {"batch": 3, "tokens": 154, "height": 17, "width": 11},
)

# Largest error of a graph that computes in f16, eleven bits for each of its roundings.
HALF_TOLERANCE = 5e-3

Reference = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]
Inputs = tuple[dict[str, int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    component: str
    dialect: str
    shape: dict[str, int]
    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return bool(self.error <= self.tolerance)


def check(checkpoint: Checkpoint, built: dict[str, dict[str, bytes]]) -> bool:
    """Prints the table; true when every row passes."""
    return report(compare(checkpoint, built))


def report(rows: Iterable[Row]) -> bool:
    """Prints rows as they come and how many passed; true when all did."""
    passed = count = 0
    for row in rows:
        mark = "ok" if row.passed else "FAILED"
        sizes = "x".join(map(str, row.shape.values()))
        error = f"{row.error:9.2e} <= {row.tolerance:.0e}"
        print(f"{row.component:15} {row.dialect:6} {sizes:14} {row.output:14} {error} {mark}", flush=True)
        passed, count = passed + row.passed, count + 1
    print(f"{passed} of {count} comparisons within tolerance")
    return passed == count


def compare(checkpoint: Checkpoint, built: dict[str, dict[str, bytes]]) -> Iterator[Row]:
    """Every graph, dialect and shape; the reference is the library's own forward."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for graph in checkpoint.graphs():
        if graph.component not in built:
            continue
        if graph.weights not in tensors:
            tensors.clear()
            tensors[graph.weights] = load(checkpoint.source.weights(graph.weights))
        cases = [(sizes, _inputs(checkpoint, graph, sizes)) for sizes in _shapes(checkpoint, graph)]
        with torch.no_grad():
            yield from against(
                graph, built[graph.component], tensors[graph.weights], _reference(checkpoint, graph), cases
            )


def against(
    graph: Graph, lowered: dict[str, bytes], tensors: dict[str, torch.Tensor], reference: Reference, cases: list[Inputs]
) -> Iterator[Row]:
    """One graph in each dialect; a case is sizes and inputs."""
    expected = [reference(inputs) for _, inputs in cases]
    for dialect, data in lowered.items():
        session = open_session(data, tensors)
        tolerance = HALF_TOLERANCE if dialect == "cuda" and graph.half else graph.tolerance
        for (sizes, inputs), wanted in zip(cases, expected, strict=True):
            actual = session.run(None, fed(session, inputs))
            for port, want, got in zip(graph.outputs, wanted, actual, strict=True):
                error = relative_error(got.astype(np.float32), want.numpy())
                yield Row(graph.component, dialect, sizes, port.name, error, tolerance)


def fed(session: ort.InferenceSession, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What the session takes of the inputs, in the types that its ports have."""
    half = {port.name: port.type == "tensor(float16)" for port in session.get_inputs()}
    return {name: (inputs[name].half() if narrow else inputs[name]).numpy() for name, narrow in half.items()}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest expected value; infinite when the shapes differ."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    scale = float(np.abs(expected).max())
    return float(np.abs(actual - expected).max()) / (scale or 1.0)


def local(file: File) -> Path:
    """The file on this machine, downloaded when it is a hub file."""
    if file.path is not None:
        return file.path
    return hub.download(file.repo, file.file, file.revision)


def load(files: list[File]) -> dict[str, torch.Tensor]:
    """All tensors of a component by their names in the files, in f32."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update({name: tensor.float() for name, tensor in load_file(local(file)).items()})
    return tensors


def open_session(data: bytes, tensors: dict[str, torch.Tensor]) -> ort.InferenceSession:
    """A CPU session whose weights come from `tensors` by name, in the types that the graph declares."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    types = trace.weight_types(data)
    arrays = [np.ascontiguousarray(tensors[name].numpy().astype(types[name])) for name in types]
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    options.add_external_initializers(list(types), values)
    return ort.InferenceSession(emulate.on_cpu(data), options, providers=["CPUExecutionProvider"])


def _shapes(checkpoint: Checkpoint, graph: Graph) -> Iterator[dict[str, int]]:
    for sizes in SHAPES:
        if graph.inputs[0].name == "input_ids":
            encoder = next(e for e in checkpoint.encoders if e.component == graph.component)
            sizes = {**sizes, "tokens": min(sizes["tokens"], encoder.positions)}
        scale = checkpoint.vae["scale"]
        sizes = {**sizes, "Height": sizes["height"] * scale, "Width": sizes["width"] * scale}
        if graph.component == "unet_image":
            sizes = {**sizes, **verify_pictures.sizes(graph, sizes)}
        used = {dim for port in graph.inputs for dim in port.shape if isinstance(dim, str)}
        yield {name: size for name, size in sizes.items() if name in used}


def _inputs(checkpoint: Checkpoint, graph: Graph, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(len(graph.component) + sum(sizes.values()))
    inputs = {}
    for port in graph.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in port.shape]
        if port.name == "input_ids":
            inputs[port.name] = _ids(checkpoint, graph, shape, random)
        elif port.name == "timestep":
            inputs[port.name] = torch.tensor([958.5])
        elif port.name == "time_ids":
            inputs[port.name] = torch.randint(0, 1024, shape, generator=random).float()
        else:
            inputs[port.name] = torch.randn(shape, generator=random)
    return inputs | verify_pictures.inputs(inputs, sizes, random)


def _ids(checkpoint: Checkpoint, graph: Graph, shape: list[int], random: torch.Generator) -> torch.Tensor:
    """Random ids, each row with its end token at another place and once more after it."""
    encoder = next(e for e in checkpoint.encoders if e.component == graph.component)
    config = text_encoder.parse(encoder.config)
    last = config.vocab_size - 1
    end = last if config.eos_token_id == 2 else config.eos_token_id
    ids = torch.randint(0, last, shape, generator=random)
    ids[ids == end] = 0
    for row in range(shape[0]):
        ids[row, (row * 5 + 3) % shape[1]] = end
        ids[row, -1] = end
    return ids


def _folder(checkpoint: Checkpoint, component: str) -> Path:
    files = checkpoint.source.weights(component)
    config = checkpoint.source.file(f"{component}/config.json")
    for file in files:
        local(file)
    return local(config).parent


def _reference(checkpoint: Checkpoint, graph: Graph) -> Reference:
    """The library's own model on the checkpoint's weights, called as its pipeline would."""
    folder = _folder(checkpoint, graph.weights)
    if graph.inputs[0].name == "input_ids":
        return _text_reference(checkpoint, graph, folder)
    if graph.weights == "unet":
        extra = unet.overrides(checkpoint.unet_config)
        net = diffusers.UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=torch.float32, **_variant(checkpoint, graph), **extra
        )
        kinds = {"kv": _kv_reference, "unet_image": verify_pictures.denoiser}
        return kinds.get(graph.component, _unet_reference)(net.eval())
    net = diffusers.AutoencoderKL.from_pretrained(
        folder, torch_dtype=torch.float32, **_variant(checkpoint, graph)
    ).eval()
    if graph.component == "vae_decoder":
        return lambda x: (net.decode(x["latent_sample"]).sample,)

    def encode(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        moments = net.encode(x["sample"]).latent_dist
        return moments.mean, moments.logvar

    return encode


def _variant(checkpoint: Checkpoint, graph: Graph) -> dict[str, str]:
    variant = checkpoint.source.variant
    names = [Path(file.file).name for file in checkpoint.source.weights(graph.weights)]
    return {"variant": variant} if variant and any(f".{variant}" in name for name in names) else {}


def _text_reference(checkpoint: Checkpoint, graph: Graph, folder: Path) -> Reference:
    encoder = next(e for e in checkpoint.encoders if e.component == graph.component)
    kind = text_encoder.CLASSES[encoder.class_name]
    net = kind.from_pretrained(folder, dtype=torch.float32, **_variant(checkpoint, graph)).eval()

    def run(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out = net(x["input_ids"], output_hidden_states=True)
        hidden = out.hidden_states[-2]
        return (hidden,) if encoder.projection is None else (hidden, out.text_embeds)

    return run


def _kv_reference(net: diffusers.UNet2DConditionModel) -> Reference:
    def run(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        context = x["encoder_hidden_states"]
        return tuple(
            torch.stack([side(context) for _, attn in layers for side in (attn.to_k, attn.to_v)])
            for layers in unet.kv_layers(net).values()
        )

    return run


class _GivenKeysValues:
    """An attention processor that takes K and V from a table; all else as diffusers' default processor."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def __call__(self, attn, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(self.k), heads(self.v)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _unet_reference(net: diffusers.UNet2DConditionModel) -> Reference:
    def run(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for width, layers in unet.kv_layers(net).items():
            packed = x[f"text_kv_{width}"]
            for i, (_, attn) in enumerate(layers):
                attn.set_processor(_GivenKeysValues(packed[2 * i], packed[2 * i + 1]))
        batch = x["sample"].shape[0]
        unused = torch.zeros(batch, 1, 1)
        added = {"text_embeds": x["text_embeds"], "time_ids": x["time_ids"]}
        return (net(x["sample"], x["timestep"], unused, added_cond_kwargs=added).sample,)

    return run
