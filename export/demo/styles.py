"""Styles: what becomes of a flat drawing, each a way of its own to see lines, colours and grain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from export.demo import drawing
from export.demo.people import Portrait

SIDE = 128
"""Pixels along a side of a finished picture."""

Levels = np.ndarray
"""`[height, width, 3]` f32, 0 to 1."""


def render(what: Portrait) -> Image.Image:
    """The finished picture, of 128 pixels along a side."""
    flat = drawing.draw(what).astype(np.float32) / 255.0
    styled = _STYLES[what.style](flat, np.random.default_rng(what.grain))
    return _image(styled).resize((SIDE, SIDE), Image.Resampling.BOX)


def _image(levels: Levels) -> Image.Image:
    return Image.fromarray(np.clip(levels * 255.0 + 0.5, 0, 255).astype(np.uint8))


def _levels(image: Image.Image) -> Levels:
    return np.asarray(image, dtype=np.float32) / 255.0


def _blurred(levels: Levels, radius: float) -> Levels:
    return _levels(_image(levels).filter(ImageFilter.GaussianBlur(radius)))


def _grey(levels: Levels) -> np.ndarray:
    return levels @ np.array([0.299, 0.587, 0.114], np.float32)


def _edges(levels: Levels) -> np.ndarray:
    """How much colours change around a place, 0 to 1."""
    down = np.abs(np.diff(levels, axis=0, append=levels[-1:])).max(axis=-1)
    across = np.abs(np.diff(levels, axis=1, append=levels[:, -1:])).max(axis=-1)
    return np.clip((down + across) * 1.6, 0.0, 1.0)


def _noise(chance: np.random.Generator, cells: int, side: int) -> np.ndarray:
    """Smooth noise of so many cells along a side, about -1 to 1."""
    coarse = Image.fromarray(chance.normal(0.0, 0.5, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _poster(levels: Levels, _: np.random.Generator) -> Levels:
    return levels


def _ink(levels: Levels, chance: np.random.Generator) -> Levels:
    """Black lines, and hatching where it is dark."""
    grey, side = _grey(levels), levels.shape[0]
    rows, columns = np.mgrid[0:side, 0:side]
    wobble = 2.0 * _noise(chance, 24, side)
    rising = ((rows + columns + wobble) % 7.0) < 2.2
    falling = ((rows - columns + wobble) % 7.0) < 2.2
    dark = (rising & (grey < 0.55)) | (falling & (grey < 0.35)) | (grey < 0.13)
    ink = np.maximum(_edges(levels), dark * 0.9)
    paper = np.array([0.97, 0.96, 0.92], np.float32)
    return paper * (1.0 - ink[..., None]) + 0.08 * ink[..., None]


def _watercolour(levels: Levels, chance: np.random.Generator) -> Levels:
    """Light washes that run into one another on rough paper."""
    side = levels.shape[0]
    shift = 5.0 * np.stack([_noise(chance, 20, side), _noise(chance, 20, side)])
    rows, columns = np.mgrid[0:side, 0:side]
    moved = np.clip(np.stack([rows, columns]) + shift, 0, side - 1).astype(int)
    wash = _blurred(levels[moved[0], moved[1]], 2.2)
    rim = _edges(_blurred(levels, 1.5))[..., None] * 0.35
    paper = 1.0 + 0.08 * _noise(chance, 90, side)[..., None]
    pools = 1.0 + 0.18 * _noise(chance, 9, side)[..., None]
    light = 1.0 - (1.0 - wash) * 0.72 * pools
    return (light - rim * (1.0 - wash)) * paper


def _pixels(levels: Levels, _: np.random.Generator) -> Levels:
    """Thirty-two squares along a side, few colours."""
    small = _image(levels).resize((32, 32), Image.Resampling.BOX)
    few = small.quantize(20, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return _levels(few.resize((levels.shape[1], levels.shape[0]), Image.Resampling.NEAREST))


def _oil(levels: Levels, chance: np.random.Generator) -> Levels:
    """Short thick strokes of a warm palette."""
    side = levels.shape[0]
    painted = _levels(_image(levels).filter(ImageFilter.ModeFilter(9)))
    stroke = chance.normal(0.0, 1.0, (side, side)).astype(np.float32)
    angle = _noise(chance, 5, side) > 0
    across = np.stack([np.roll(stroke, i, 1) for i in range(-4, 5)]).mean(0)
    down = np.stack([np.roll(stroke, i, 0) for i in range(-4, 5)]).mean(0)
    relief = np.where(angle, across, down)[..., None]
    warm = painted * np.array([1.0, 0.92, 0.78], np.float32) * 0.9 + np.array([0.05, 0.03, 0.0], np.float32)
    return warm + 0.13 * relief


def _sepia(levels: Levels, chance: np.random.Generator) -> Levels:
    """A brown photograph, soft, grainy, darker towards its corners."""
    side = levels.shape[0]
    grey = _grey(_blurred(levels, 1.6)) * 0.8 + 0.12
    grey = grey + 0.05 * chance.normal(0.0, 1.0, (side, side)).astype(np.float32)
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    grey = grey * (1.0 - 0.32 * (rows**2 + columns**2))
    dark, light = np.array([0.2, 0.12, 0.05], np.float32), np.array([0.98, 0.9, 0.74], np.float32)
    return dark + np.clip(grey, 0, 1)[..., None] * (light - dark)


def _chalkboard(levels: Levels, chance: np.random.Generator) -> Levels:
    """Chalk on a green board: light lines, rubbed fillings of the lighter colours."""
    side = levels.shape[0]
    grain = np.clip(0.75 + 0.5 * chance.normal(0.0, 1.0, (side, side)).astype(np.float32), 0.0, 1.0)[..., None]
    lines = np.clip(1.5 * _edges(_blurred(levels, 0.7)), 0.0, 1.0)[..., None]
    filled = 0.45 * np.clip(_grey(levels) - 0.35, 0.0, 1.0)[..., None]
    board = np.array([0.1, 0.24, 0.19], np.float32) * (1.0 + 0.15 * _noise(chance, 12, side)[..., None])
    chalk = np.array([0.94, 0.95, 0.9], np.float32)
    share = np.clip(np.maximum(lines, filled) * grain, 0.0, 1.0)
    return board * (1.0 - share) + chalk * share


_STYLES: dict[str, Callable[[Levels, np.random.Generator], Levels]] = {
    "flat poster": _poster,
    "ink drawing": _ink,
    "watercolour": _watercolour,
    "pixel art": _pixels,
    "oil painting": _oil,
    "sepia photograph": _sepia,
    "chalkboard": _chalkboard,
}
