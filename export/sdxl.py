"""Reads an SDXL checkpoint's configs into the graphs to trace and the facts for the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch._subclasses.fake_tensor import FakeTensorMode

from export import graphs
from export.errors import ExportError, refuse
from export.graphs import Graph
from export.models import kv, text_encoder, unet, vae
from export.source import File, Source

_PIPELINES = "StableDiffusionXL"
_ROLES = {6: "base", 5: "refiner"}
_DEFAULT_STEPS = 50
_DEFAULT_GUIDANCE = 5.0
# Text encoder -> folder of its tokenizer.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

# module suffix -> suffix in checkpoints written before diffusers 0.18
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@dataclass(frozen=True)
class Encoder:
    """One text encoder as the catalogue needs it."""

    component: str
    class_name: str
    config: dict
    width: int
    projection: int | None
    positions: int


@dataclass(frozen=True)
class Checkpoint:
    """Everything read from the configs; `unet` and `vae` are the catalogue's sections."""

    source: Source
    role: str
    encoders: list[Encoder]
    pooled: str
    unet: dict
    vae: dict
    index: dict
    unet_config: dict
    vae_config: dict
    frequencies: tuple[list[float], list[float]]
    headers: dict[str, dict[str, tuple[int, ...]] | None] = field(default_factory=dict)

    def graphs(self) -> list[Graph]:
        """One declaration per component, in the catalogue's order."""
        declared = [_encoder_graph(encoder) for encoder in self.encoders]
        config, freqs, channels = self.unet_config, self.frequencies, self.vae["latent_channels"]
        facts = {**self.unet, "out_channels": config.get("out_channels", 4)}
        half = not self.vae["force_upcast"]
        denoisers = [graphs.unet(facts, lambda: unet.Denoiser(unet.build(config), *freqs))]
        if self.sees_pictures:
            seeing = graphs.unet_image(facts, lambda: unet.Denoiser(unet.build(config), *freqs, pictures=True))
            denoisers.append(seeing)
        return [
            *declared,
            graphs.kv(self.unet["cross_attention_dim"], self.unet["kv"], lambda: kv.TextKeysValues(unet.build(config))),
            *denoisers,
            graphs.vae_decoder(channels, lambda: vae.Decoder(vae.build(self.vae_config)), half),
            graphs.vae_encoder(channels, lambda: vae.Encoder(vae.build(self.vae_config)), half),
        ]

    @property
    def sees_pictures(self) -> bool:
        """Whether image prompts can be told to it: adapters are published for base models alone."""
        return "attentions" in self.unet

    def weights(self) -> dict[str, list[File]]:
        """Weights key -> files."""
        keys = [*(encoder.component for encoder in self.encoders), "unet", "vae"]
        return {key: self.source.weights(key) for key in keys}

    def resolve(self, component: str) -> Callable[[str, tuple[int, ...]], str]:
        """Finds a tensor's name in the component's files; without files at hand the hub's convention stands."""
        if component not in self.headers:
            self.headers[component] = self.source.header(component)
        header = self.headers[component]

        def find(name: str, shape: tuple[int, ...]) -> str:
            return name if header is None else _find(component, header, name, shape)

        return find


def _find(component: str, header: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> str:
    old = name
    for new, ancient in _OLD_ATTENTION.items():
        old = old.replace(new, ancient)
    for key in (name, old, name.removeprefix("text_model.")):
        if key in header:
            if header[key] != shape:
                raise ExportError(
                    f"{component}: tensor {key} has shape {list(header[key])} in the file, but the config makes it "
                    f"{list(shape)}; config.json and weights do not belong together"
                )
            return key
    raise ExportError(f"{component}: tensor {name} is missing in the weights; config.json and weights do not match")


def _encoder_graph(encoder: Encoder) -> Graph:
    def build() -> text_encoder.TextEncoder:
        return text_encoder.TextEncoder(text_encoder.build(encoder.class_name, encoder.config))

    return graphs.text_encoder(encoder.component, encoder.width, encoder.projection, build)


def read(source: Source) -> Checkpoint:
    """Reads and checks all configs of a checkpoint."""
    index = source.json("model_index.json")
    name = index.get("_class_name", "")
    if not name.startswith(_PIPELINES):
        raise ExportError(f"model_index.json: `_class_name` is {name!r}; allowed: {_PIPELINES}… pipelines")
    encoders = _encoders(source, index)
    pooled = next((encoder for encoder in encoders if encoder.projection is not None), None)
    if pooled is None:
        raise ExportError("no text encoder is a CLIPTextModelWithProjection; SDXL's UNet needs its pooled output")
    unet_config, vae_config = source.json("unet/config.json"), source.json("vae/config.json")
    _expect_class("unet", unet_config, unet.CLASS)
    _expect_class("vae", vae_config, vae.CLASS)
    unet.check(unet_config)
    vae.check(vae_config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = unet.build(unet_config)
        decoder = vae.build(vae_config)
    facts = _unet_facts(net, pooled.projection)
    if (total := sum(encoder.width for encoder in encoders)) != facts["cross_attention_dim"]:
        raise refuse("unet", "cross_attention_dim", facts["cross_attention_dim"], f"{total}, all encoders together")
    role = _ROLES[facts["time_ids"]]
    if bool(index.get("requires_aesthetics_score", False)) != (role == "refiner"):
        raise ExportError(
            f"model_index.json: `requires_aesthetics_score` is {index.get('requires_aesthetics_score')!r}, but the "
            f"UNet takes {facts['time_ids']} time ids ({role}); 6 go with false, 5 with true"
        )
    frequencies = (unet.frequencies(net.time_proj), unet.frequencies(net.add_time_proj))
    vae_facts = _vae_facts(decoder.config)
    return Checkpoint(
        source, role, encoders, pooled.component, facts, vae_facts, index, unet_config, vae_config, frequencies
    )


def _expect_class(component: str, config: dict, name: str) -> None:
    if config.get("_class_name", name) != name:
        raise refuse(component, "_class_name", config["_class_name"], name)


def _encoders(source: Source, index: dict) -> list[Encoder]:
    found = []
    for component in TOKENIZERS:
        _, class_name = index.get(component) or (None, None)
        if class_name is None:
            continue
        config = source.json(f"{component}/config.json")
        text_encoder.check(component, config)
        parsed = text_encoder.parse(config)
        if class_name not in text_encoder.CLASSES:
            allowed = ", ".join(text_encoder.CLASSES)
            raise ExportError(f"model_index.json: {component} is {class_name!r}, not supported; allowed: {allowed}")
        projected = text_encoder.CLASSES[class_name] is text_encoder.CLIPTextModelWithProjection
        projection = parsed.projection_dim if projected else None
        width, positions = parsed.hidden_size, parsed.max_position_embeddings
        found.append(Encoder(component, class_name, config, width, projection, positions))
    if not found:
        raise ExportError("model_index.json names no text encoder; SDXL needs text_encoder_2 at least")
    return found


def _unet_facts(net, pooled: int) -> dict:
    config = net.config
    ids, rest = divmod(config.projection_class_embeddings_input_dim - pooled, config.addition_time_embed_dim)
    if rest or ids not in _ROLES:
        allowed = " or ".join(str(pooled + n * config.addition_time_embed_dim) for n in _ROLES)
        key = "projection_class_embeddings_input_dim"
        raise refuse("unet", key, getattr(config, key), f"{allowed} (pooled width + 6 or 5 embedded time ids)")
    context = config.cross_attention_dim
    facts = {
        "in_channels": config.in_channels,
        "sample_size": _square("unet", config.sample_size),
        "time_ids": ids,
        "cross_attention_dim": context if isinstance(context, int) else context[0],
        "pooled_dim": pooled,
        "kv": {width: len(layers) for width, layers in unet.kv_layers(net).items()},
    }
    return {**facts, "attentions": unet.attentions(net)} if _ROLES[ids] == "base" else facts


def _square(component: str, size: object) -> int:
    size = size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size
    if not isinstance(size, int):
        raise refuse(component, "sample_size", size, "one integer")
    return size


def _vae_facts(config) -> dict:
    return {
        "scaling_factor": float(config.scaling_factor),
        "shift_factor": _floats(config.shift_factor),
        "latents_mean": _floats(config.latents_mean),
        "latents_std": _floats(config.latents_std),
        "latent_channels": config.latent_channels,
        "scale": 2 ** (len(config.block_out_channels) - 1),
        "sample_size": _square("vae", config.sample_size),
        "force_upcast": bool(config.force_upcast),
    }


def _floats(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [float(item) for item in value]
    return None if value is None else float(value)


def tokenizer(source: Source, encoder: Encoder, root) -> dict:
    """The catalogue's `tokenizer` section: files, special ids, padded length."""
    folder = TOKENIZERS[encoder.component]
    ids = source.token_ids(folder)
    config = source.json(f"{folder}/tokenizer_config.json")
    special = source.json(name) if (name := f"{folder}/special_tokens_map.json") in source.files else {}
    section: dict[str, object] = {}
    if f"{folder}/vocab.json" in source.files:
        for key, file in (("vocab", "vocab.json"), ("merges", "merges.txt")):
            if f"{folder}/{file}" not in source.files:
                raise ExportError(f"{source.origin}: {folder}/{file} is missing")
            section[key] = source.file(f"{folder}/{file}").reference(root)
    else:
        section["json"] = source.file(f"{folder}/tokenizer.json").reference(root)
    defaults = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
    for key, default in defaults.items():
        token = config.get(f"{key}_token") or special.get(f"{key}_token") or default
        token = token["content"] if isinstance(token, dict) else token
        if token not in ids:
            raise ExportError(f"{source.origin}: {folder}/ names {token!r} as its {key} token, which has no id")
        section[key] = ids[token]
    section["length"] = min(int(config.get("model_max_length") or encoder.positions), encoder.positions)
    return section


_SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSDEScheduler": "dpmpp-sde",
    "DPMSolverSinglestepScheduler": "dpmpp-singlestep",
    "EDMDPMSolverMultistepScheduler": "edm-dpmpp-2m",
    "EDMEulerScheduler": "edm-euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "SASolverScheduler": "sa-solver",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
"""This project's names for diffusers' classes."""


def scheduler(source: Source) -> tuple[dict, str | None]:
    """scheduler_config.json without its version, and this project's name for the class when it has one."""
    config = source.json("scheduler/scheduler_config.json")
    config.pop("_diffusers_version", None)
    name = _SCHEDULERS.get(config.get("_class_name", ""))
    if name == "dpmpp-2m":
        by_algorithm = {"dpmsolver++": "dpmpp-2m", "deis": "dpmpp-2m", "sde-dpmsolver++": "dpmpp-2m-sde"}
        name = by_algorithm.get(config.get("algorithm_type", "dpmsolver++"))
    return config, name


def entry(checkpoint: Checkpoint, root, graph_paths: dict, steps: int | None, guidance: float | None) -> dict:
    """The catalogue entry, less `licence`."""
    source = checkpoint.source
    weights = {key: [file.reference(root) for file in files] for key, files in checkpoint.weights().items()}
    config, name = scheduler(source)
    size = checkpoint.unet["sample_size"] * checkpoint.vae["scale"]
    steps, guidance = steps or _DEFAULT_STEPS, _DEFAULT_GUIDANCE if guidance is None else guidance
    defaults = {"width": size, "height": size, "steps": steps, "guidance": float(guidance)}
    text = [
        {
            "encoder": encoder.component,
            "tokenizer": tokenizer(source, encoder, root),
            "pooled": encoder.component == checkpoint.pooled,
        }
        for encoder in checkpoint.encoders
    ]
    return {
        "family": "sdxl",
        "role": checkpoint.role,
        "origin": source.describe(root),
        "weights": weights,
        "graphs": graph_paths,
        "text": text,
        "unet": checkpoint.unet,
        "vae": checkpoint.vae,
        "force_zeros_for_empty_prompt": bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)),
        "requires_aesthetics_score": bool(checkpoint.index.get("requires_aesthetics_score", False)),
        "scheduler": config,
        "defaults": defaults if name is None else {**defaults, "scheduler": name},
    }
