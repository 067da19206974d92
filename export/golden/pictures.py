"""Reference pictures and area masks as Pillow, transformers and diffusers prepare them.

Pictures to resize are a formula that `tests/pictures.rs` knows too, so that only digests are kept; files to read are
kept whole, beside what Pillow reads from them.
"""

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
import transformers
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from transformers import CLIPImageProcessorPil
from transformers.image_transforms import convert_to_rgb

RESIZES = [
    ((97, 61), (224, 140)),
    ((97, 61), (41, 29)),
    ((640, 427), (335, 224)),
    ((1201, 803), (224, 224)),
    ((50, 300), (50, 77)),
    ((300, 50), (77, 50)),
    ((33, 33), (33, 33)),
    ((1, 1), (7, 5)),
    ((3, 2), (640, 480)),
    ((640, 480), (3, 2)),
    ((5, 900), (200, 4)),
    ((224, 224), (223, 225)),
]
"""Sizes, width first, before and after."""

CLIPS = [(640, 427), (427, 640), (224, 224), (225, 224), (300, 301), (61, 97), (50, 800), (1000, 37), (1201, 803)]
"""Sizes of the pictures for an encoder."""

RULES = {
    "clip": {
        "size": 224,
        "mean": transformers.image_utils.OPENAI_CLIP_MEAN,
        "std": transformers.image_utils.OPENAI_CLIP_STD,
    },
    "half": {"size": 33, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}

MASKS = [
    ((256, 192), (256, 192)),
    ((97, 61), (256, 192)),
    ((900, 1200), (192, 256)),
    ((61, 61), (200, 136)),
    ((320, 200), (832, 1216)),
    ((2, 2), (256, 256)),
]
"""Sizes of a mask and of the picture that is painted."""


def formula(kind: str, width: int, height: int) -> np.ndarray:
    """Levels ``[height, width, 3]``: noise, or blocks of black and white that overshoot when resized."""
    y, x, c = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in (height, width, 3)), indexing="ij")
    if kind == "blocks":
        x, y = x // 9, y // 7
    value = (x * np.uint32(73856093)) ^ (y * np.uint32(19349663)) ^ (c * np.uint32(83492791))
    value = (value ^ (value >> 13)) * np.uint32(1540483477)
    levels = ((value >> 15) & 255).astype(np.uint8)
    return np.where(levels >= 128, 255, 0).astype(np.uint8) if kind == "blocks" else levels


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def resizes() -> Iterator[dict[str, Any]]:
    """Digests of pictures that Pillow resized."""
    for kind in ("noise", "blocks"):
        for before, after in RESIZES:
            picture = Image.fromarray(formula(kind, *before))
            for name in ("bicubic", "lanczos"):
                resized = np.array(picture.resize(after, Image.Resampling[name.upper()]))
                yield {"kind": kind, "before": before, "after": after, "filter": name, "sha256": digest(resized)}


def padded(picture: Image.Image, rule: dict[str, Any]) -> np.ndarray:
    """The whole picture between bars of zeros."""
    size, long = rule["size"], max(picture.size)
    width, height = (max(1, math.floor(side * size / long + 0.5)) for side in picture.size)
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=rule["mean"], image_std=rule["std"]
    )
    fitted = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = processor(fitted, return_tensors="np").pixel_values[0]
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(pixels, ((0, 0), (top, size - height - top), (left, size - width - left)))


def clips() -> Iterator[dict[str, Any]]:
    """Digests of what transformers' processor without torchvision makes of pictures."""
    for name, rule in RULES.items():
        size, normal = rule["size"], {"image_mean": rule["mean"], "image_std": rule["std"]}
        square = {"height": size, "width": size}
        center = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **normal)
        stretch = CLIPImageProcessorPil(size=square, do_center_crop=False, **normal)
        for before in CLIPS:
            picture = Image.fromarray(formula("blocks" if name == "half" else "noise", *before))
            made = {
                "center": center(picture, return_tensors="np").pixel_values[0],
                "pad": padded(picture, rule),
                "stretch": stretch(picture, return_tensors="np").pixel_values[0],
            }
            for crop, pixels in made.items():
                assert pixels.dtype == np.float32
                yield {"rule": name, "before": before, "crop": crop, "sha256": digest(pixels)}


def masks(tensors: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Masks as diffusers preprocesses them (digests) and puts them on the grids of a UNet's layers (values)."""
    processor = IPAdapterMaskProcessor()
    for index, (before, (width, height)) in enumerate(MASKS):
        picture = Image.fromarray(formula("blocks", *before))
        mask = processor.preprocess(picture, height=height, width=width)
        grids = []
        for factor in (2, 4):
            rows, columns = (math.ceil(side / 8 / factor) for side in (height, width))
            values = processor.downsample(mask[0], 1, rows * columns, 1)
            tensors[f"mask.{index}.{factor}"] = values.reshape(rows, columns).numpy()
            grids.append({"factor": factor, "grid": [rows, columns]})
        levels = mask[0, 0].numpy().astype(np.uint8)
        yield {"before": before, "size": [width, height], "sha256": digest(levels), "grids": grids}


def png(color: int, depth: int, levels: np.ndarray) -> bytes:
    """A PNG of samples that Pillow cannot write."""
    height, width = levels.shape[:2]
    lines = levels.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1)
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A picture in a file format."""
    to = io.BytesIO()
    picture.save(to, form, **options)
    return to.getvalue()


def smooth(width: int, height: int) -> np.ndarray:
    """Levels that lossy formats keep well."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 + 120 * np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) for c in range(4)]
    return np.stack(waves, -1).astype(np.uint8)


def files() -> Iterator[tuple[str, bytes]]:
    """Files of every kind: a name, the content."""
    noise, wide = formula("noise", 23, 14), smooth(50, 37)
    rgb, alpha = Image.fromarray(noise), Image.fromarray(formula("noise", 14, 23)[..., 0].T.copy())
    rgba, grey = rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    yield "png-rgb", saved(rgb, "PNG")
    yield "png-grey", saved(grey, "PNG")
    yield "png-one-bit", saved(rgb.convert("1"), "PNG")
    yield "png-grey-alpha", saved(Image.merge("LA", (grey, alpha)), "PNG")
    yield "png-rgba", saved(rgba, "PNG")
    yield "png-palette", saved(rgb.quantize(200), "PNG")
    yield "png-palette-four-bits", saved(rgb.quantize(11), "PNG", bits=4)
    yield "png-palette-transparent", saved(rgb.quantize(20), "PNG", transparency=bytes(range(0, 240, 12)))
    yield "png-rgb-transparent", saved(rgb, "PNG", transparency=tuple(int(v) for v in noise[3, 4]))
    yield "png-profile", saved(rgb, "PNG", icc_profile=b"not a profile")
    sixteen = formula("noise", 23, 28).reshape(14, 2, 23, 3).astype(np.uint16)
    sixteen = sixteen[:, 0] * 256 + sixteen[:, 1]
    yield "png-rgb-sixteen", png(2, 16, sixteen)
    yield "png-rgba-sixteen", png(6, 16, np.concatenate([sixteen, sixteen[::-1, :, :1]], -1))
    yield "png-grey-alpha-sixteen", png(4, 16, sixteen[..., :2])
    for way in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = way
        yield f"png-turned-{way}", saved(rgb, "PNG", exif=exif)
        yield f"webp-turned-{way}", saved(rgb, "WEBP", lossless=True, exif=exif)
        yield f"jpeg-turned-{way}", saved(Image.fromarray(wide[..., :3]), "JPEG", quality=95, exif=exif)
    yield "webp-rgb", saved(rgb, "WEBP", lossless=True)
    yield "webp-rgba", saved(rgba, "WEBP", lossless=True, exact=True)
    yield "webp-lossy", saved(Image.fromarray(wide[..., :3]), "WEBP", quality=80)
    moving = {"save_all": True, "append_images": [ImageOps.invert(rgb)], "lossless": True}
    yield "webp-animated", saved(rgb, "WEBP", **moving)
    yield "bmp-rgb", saved(rgb, "BMP")
    yield "bmp-grey", saved(grey, "BMP")
    yield "bmp-palette", saved(rgb.quantize(50), "BMP")
    picture = Image.fromarray(wide[..., :3])
    yield "jpeg-444", saved(picture, "JPEG", quality=95, subsampling=0)
    yield "jpeg-422", saved(picture, "JPEG", quality=95, subsampling=1)
    yield "jpeg-420", saved(picture, "JPEG", quality=95, subsampling=2)
    yield "jpeg-progressive", saved(picture, "JPEG", quality=95, progressive=True)
    yield "jpeg-restarts", saved(picture, "JPEG", quality=95, restart_marker_blocks=2)
    yield "jpeg-grey", saved(picture.convert("L"), "JPEG", quality=95)
    yield "jpeg-rgb", saved(picture, "JPEG", quality=95, keep_rgb=True)
    rough = Image.fromarray(formula("noise", 67, 41))
    for quality in (5, 30, 75, 90, 100):
        for subsampling in (0, 1, 2):
            kind = {"quality": quality, "subsampling": subsampling, "progressive": quality == 30}
            yield f"jpeg-rough-{quality}-{subsampling}", saved(rough, "JPEG", **kind)
    cmyk = saved(Image.fromarray(wide, "RGBA").convert("RGBA"), "PNG")
    cmyk = Image.frombytes("CMYK", picture.size, np.array(Image.open(io.BytesIO(cmyk))).tobytes())
    inks = saved(cmyk, "JPEG", quality=95, subsampling=0)
    yield "jpeg-cmyk", inks
    mark = inks.index(b"Adobe") + 11
    yield "jpeg-ycck", inks[:mark] + b"\x02" + inks[mark + 1 :]
    yield "jpeg-followed", saved(picture, "JPEG", quality=95) + b"what a telephone adds" * 9


def read(content: bytes) -> np.ndarray:
    """The first picture in a file, upright, over white."""
    picture = Image.open(io.BytesIO(content))
    return convert_to_rgb(ImageOps.exif_transpose(picture), return_numpy=True)


def write(out: Path) -> list[Path]:
    """Write ``pictures.safetensors``."""
    tensors: dict[str, np.ndarray] = {}
    kept = []
    for name, content in files():
        tensors[f"{name}.file"] = np.frombuffer(content, np.uint8)
        tensors[f"{name}.levels"] = read(content)
        kept.append(name)
    document = {
        "made_by": "python -m export.golden pictures",
        "versions": {m.__name__: m.__version__ for m in (PIL, transformers, diffusers, torch, np)},
        "tolerance": "none: every bit equal; masks on grids 1e-6",
        "resizes": list(resizes()),
        "rules": RULES,
        "clips": list(clips()),
        "masks": list(masks(tensors)),
        "files": kept,
    }
    path = out / "pictures.safetensors"
    save_file(tensors, path, metadata={"document": json.dumps(document)})
    return [path]
