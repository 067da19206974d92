"""Long and weighted prompts encoded plainly with transformers, after AUTOMATIC1111's web UI, for `parity.py`.

Token by token on the pipeline's own tokenizers and encoders: `parse_prompt_attention`, `tokenize_line` and the emphasis
"Original" of the web UI, which diffusers has no equivalent of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import diffusers
import torch
from transformers import CLIPTokenizer, PreTrainedModel

_TOKEN = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*[+-]?[.\d]+\s*\)|\)|]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_BACKTRACK = 20

Chunk = list[tuple[int, float]]


@dataclass
class _Weighted:
    """Pieces of text with weights; a piece of ``None`` is a break."""

    pieces: list[list] = field(default_factory=list)
    round: list[int] = field(default_factory=list)
    square: list[int] = field(default_factory=list)

    def multiply(self, start: int, factor: float) -> None:
        for piece in self.pieces[start:]:
            piece[1] *= factor

    def token(self, token: str) -> None:
        if token.startswith("\\"):
            self.pieces.append([token[1:], 1.0])
        elif token == "(":
            self.round.append(len(self.pieces))
        elif token == "[":
            self.square.append(len(self.pieces))
        elif token.startswith(":") and token.endswith(")") and self.round:
            self.multiply(self.round.pop(), float(token[1:-1]))
        elif token == ")" and self.round:
            self.multiply(self.round.pop(), 1.1)
        elif token == "]" and self.square:
            self.multiply(self.square.pop(), 1 / 1.1)
        else:
            for place, part in enumerate(_BREAK.split(token)):
                if place:
                    self.pieces.append([None, 1.0])
                self.pieces.append([part, 1.0])


def pieces(text: str) -> list[tuple[str | None, float]]:
    """The pieces of a prompt in the web UI's syntax, neighbours of one weight joined."""
    weighted = _Weighted()
    for token in _TOKEN.findall(text):
        weighted.token(token)
    for start in weighted.round:
        weighted.multiply(start, 1.1)
    for start in weighted.square:
        weighted.multiply(start, 1 / 1.1)
    joined: list[tuple[str | None, float]] = []
    for part, weight in weighted.pieces:
        if joined and part is not None and joined[-1][0] is not None and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + part, weight)
        else:
            joined.append((part, weight))
    return joined


def chunks(tokenizer: CLIPTokenizer, text: str, syntax: str) -> list[Chunk]:
    """Content of each chunk: ids with their weights."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.get_vocab().get(",</w>", -1) if syntax == "a1111" else -1
    done: list[Chunk] = []
    now: Chunk = []
    last_comma = -1
    for part, weight in pieces(text) if syntax == "a1111" else [(text, 1.0)]:
        if part is None:
            done.append(now)
            now, last_comma = [], -1
            continue
        for token in tokenizer(part, add_special_tokens=False).input_ids:
            if token == comma:
                last_comma = len(now)
            elif len(now) == room and last_comma != -1 and len(now) - last_comma <= _BACKTRACK:
                now, moved = now[: last_comma + 1], now[last_comma + 1 :]
                done.append(now)
                now, last_comma = moved, -1
            if len(now) == room:
                done.append(now)
                now, last_comma = [], -1
            now.append((token, weight))
    if now or not done:
        done.append(now)
    return done


def _encode(
    tokenizer: CLIPTokenizer, encoder: PreTrainedModel, chunk: Chunk, skip: int
) -> tuple[torch.Tensor, torch.Tensor]:
    length = tokenizer.model_max_length
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (length - len(ids))
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    hidden = output.hidden_states[-(skip + 2)]
    weights = torch.ones(length)
    weights[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    if (weights != 1).any():
        mean = hidden.mean()
        hidden = hidden * weights[None, :, None]
        hidden = hidden * (mean / hidden.mean())
    return hidden, output[0]


def embed(
    pipeline: diffusers.DiffusionPipeline, texts: list[list[str]], syntax: str, skips: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings and pooled embedding of prompts that are told together, each given as one text an encoder."""
    both = [
        (tokenizer, encoder)
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        if tokenizer is not None
    ]
    read = [
        [chunks(tokenizer, text, syntax) for (tokenizer, _), text in zip(both, prompt, strict=False)]
        for prompt in texts
    ]
    longest = max(len(of_encoder) for prompt in read for of_encoder in prompt)
    made = []
    for prompt, skip in zip(read, skips, strict=True):
        hidden, pooled = [], torch.empty(0)
        for (tokenizer, encoder), of_encoder in zip(both, prompt, strict=True):
            filled = of_encoder + [[]] * (longest - len(of_encoder))
            encoded = [_encode(tokenizer, encoder, chunk, skip) for chunk in filled]
            hidden.append(torch.cat([chunk for chunk, _ in encoded], dim=1))
            pooled = encoded[0][1]
        made.append((torch.cat(hidden, dim=-1), pooled))
    return made
