"""Token ids of a thousand prompts in many scripts, as transformers' tokenizer makes them, for `tests/tokens.rs`."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import transformers
from transformers import CLIPTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (
    (0x20, 0x7E),
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x1E00, 0x1EFF),
    (0x2000, 0x206F),
    (0x2100, 0x214F),
    (0x3040, 0x30FF),
    (0x4E00, 0x4EFF),
    (0xAC00, 0xACFF),
    (0xFF00, 0xFFEF),
    (0x1F300, 0x1F6FF),
)
WORDS = (
    *("a", "photo", "of", "an", "old", "sailor's", "red", "cap,", "it's", "35mm", "they'll", "I'D", "..!?", "!!"),
    *("<|endoftext|>", "<|startoftext|>", "ſ", "İ", "ǅ", "ß", "ﬁ"),
)


def prompts(count: int = 1000) -> list[str]:
    """Runs of characters of one script after the other, with words and spaces of all kinds between them."""
    chance = random.Random(7)
    made = []
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 8)):
            low, high = chance.choice(SCRIPTS)
            letters = [chr(chance.randint(low, high)) for _ in range(chance.randint(1, 6))]
            parts.append("".join(c for c in letters if unicodedata.category(c) != "Cs"))
            parts.append(chance.choice((" ", "", "  ", "\n", "\t", "\u3000", "\u00a0", ",", "-")))
            parts.append(chance.choice((*WORDS, "", "")))
            parts.append(chance.choice((" ", " ", "")))
        made.append("".join(parts))
    return made


def digest(ids: list[int]) -> str:
    """What the test compares instead of 77 numbers."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]


def write(out: Path) -> list[Path]:
    """Write ``tokens.json``."""
    folder = REPOSITORY / "tests" / "models" / "tiny"
    tokenizers = {name: CLIPTokenizer.from_pretrained(folder / name) for name in NAMES}
    texts = prompts()
    ids = {
        name: [
            digest(tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids) for text in texts
        ]
        for name, tokenizer in tokenizers.items()
    }
    document = {
        "made_by": "python -m export.golden tokenizer",
        "versions": {"transformers": transformers.__version__},
        "tolerance": "none: every id equal",
        "prompts": texts,
        "ids": ids,
    }
    path = out / "tokens.json"
    path.write_text(json.dumps(document, indent=0) + "\n")
    return [path]


NAMES = ("tokenizer", "tokenizer_2")
"""Folders of the tiny model."""
