"""Captions as tokens, in the vocabulary of CLIP, and what becomes of words that no caption has."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from export.demo import captions, people

TOKENIZER = Path("models/demo/tokenizer")
_LENGTH = 77
_START, _END, _UNKNOWN = 49406, 49407, 49405
"""The last is any token that no caption has; it learns what all such tokens become."""
_EXTRA_WORDS = 0.25
"""Share of captions among whose words unknown ones are put, so that they come to mean little."""


class Texts:
    """Makes tokens of captions. Padded with the end's token for the first encoder, with 0 for the second."""

    def __init__(self) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self._tokens: dict[str, list[int]] = {}

    def __call__(self, texts: list[str], chance: random.Random | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, 77]` for each encoder; with `chance`, some have unknown words."""
        rows = [self._ids(text, chance) for text in texts]
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) > _LENGTH:
                raise ValueError(f"{text!r} has {len(ids)} tokens; at most {_LENGTH} fit")
        first, second = (torch.tensor([ids + [pad] * (_LENGTH - len(ids)) for ids in rows]) for pad in (_END, 0))
        return first, second

    def _ids(self, text: str, chance: random.Random | None) -> list[int]:
        words = text.split(" ")
        for word in words:
            if word not in self._tokens:
                self._tokens[word] = self.tokenizer(word, add_special_tokens=False).input_ids
        parts = [self._tokens[word] for word in words]
        if chance and chance.random() < _EXTRA_WORDS:
            for _ in range(chance.randint(1, 6)):
                parts.insert(chance.randint(0, len(parts)), [_UNKNOWN])
        return [_START, *(token for part in parts for token in part), _END]


def said(texts: Texts) -> set[int]:
    """Tokens of all captions: those of so many random ones that no word is missing."""
    chance = random.Random("said")
    found = {_START, _END, 0, _UNKNOWN}
    for _ in range(20_000):
        found.update(texts._ids(captions.caption(people.portrait(chance), chance), None))
    return found


def fill_unknown(encoder: CLIPTextModel | CLIPTextModelWithProjection, known: set[int]) -> None:
    """Gives all tokens that no caption has the embedding of the unknown word."""
    table = encoder.get_input_embeddings().weight
    unknown = torch.ones(len(table), dtype=torch.bool)
    unknown[sorted(known - {_UNKNOWN})] = False
    with torch.no_grad():
        table.copy_(torch.where(unknown[:, None], table[_UNKNOWN], table))


class Context(nn.Module):
    """Both text encoders, as SDXL uses them."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context `[n, 77, 64]` from the last layers but one, pooled text `[n, 64]`."""
        one = self.first(first, output_hidden_states=True)
        two = self.second(second, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds
