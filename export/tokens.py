"""A small byte-level CLIP vocabulary, learnt from a text written for it. Twin: `transformers.CLIPTokenizer`'s files."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path

import regex

from export.errors import ExportError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

_TEXT = """
a photo of a cat sitting on the window, a photo of a dog running along the beach, a painting of a mountain lake at dawn,
a portrait of a woman with red hair, a portrait of an old man with a white beard, a watercolour of a small harbour town,
an oil painting of a ship in a storm, a drawing of a castle on a hill, a close photo of a flower with drops of water,
a wide photo of a city street at night with neon lights and rain, a bowl of fruit on a wooden table, soft morning light,
highly detailed, sharp focus, studio light, dramatic sky, warm colours, cold colours, black and white, low
quality, blurry,
an astronaut riding a horse on the moon, a robot reading a book in the library, a train crossing a bridge in the forest,
a bird on the branch of a tree, the river under the snow, the garden behind the house, the painter and the painting,
it's a picture that we've never seen, she'll paint it, they're walking, he'd stay, I'm here, don't move.
ein Foto von einer Katze am Fenster, ein schönes Gemälde mit einem Schiff, die Straße bei Nacht, grüne Wälder und Berge.
une photo d'un chat sur la fenêtre, un château près de la forêt, la lumière du matin, une rue sous la pluie à l'été.
una foto de un perro en la playa, una niña con un sombrero, el mañana, la montaña y el corazón de la ciudad.
фотография кота на окне, картина с кораблём в море. 窓の上の猫の写真、山と湖の絵。 一只猫的照片,城市的夜晚。
1 2 3 4 5 6 7 8 9 0 12 24 1024 2048 35mm f1.8 iso 400 4k 8k
"""


@cache
def byte_symbols() -> dict[int, str]:
    """The printable stand-in of every byte, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}


def learn(count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of the text, most frequent first; ties go to the pair that sorts first."""
    symbols = byte_symbols()
    words: Counter[tuple[str, ...]] = Counter()
    for word in _WORD.findall(_TEXT.lower()):
        letters = [symbols[byte] for byte in word.encode()]
        words[(*letters[:-1], letters[-1] + "</w>")] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(word, best): times for word, times in words.items()})
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def merges_for(size: int) -> list[tuple[str, str]]:
    """Merges that make a vocabulary of `size` entries: those learnt, then pairs of single bytes in CLIP's order."""
    symbols = list(byte_symbols().values())
    count = size - len(vocabulary([]))
    merges = learn(max(count, 0))
    known = set(vocabulary(merges))
    # Growing squares, so that pairs of letters come before those of bytes that text hardly has.
    pairs = sorted(itertools.product(range(len(symbols)), repeat=2), key=lambda pair: (max(pair), pair))
    for first, last in pairs:
        for end in (symbols[last], symbols[last] + "</w>"):
            if len(merges) < count and symbols[first] + end not in known:
                merges.append((symbols[first], end))
    if len(merges) != count:
        raise ExportError(f"vocab_size {size}: must lie between {len(vocabulary([]))} and about 130000")
    return merges


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Bytes, bytes that end a word, merges, start, end: CLIP's order; `!` is 0 and the end has the largest id."""
    symbols = list(byte_symbols().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def save(folder: Path, merges: list[tuple[str, str]], pad: str, length: int) -> None:
    """Writes the four files of a tokenizer folder as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {**special, "do_lower_case": True, "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    _json(folder / "vocab.json", vocabulary(merges))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _json(folder / "special_tokens_map.json", special, 2)
    _json(folder / "tokenizer_config.json", config, 2)


def _json(path: Path, value: dict, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
