"""The tiny checkpoints are real ones: the libraries load and run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from export import sdxl, tiny, tokens
from export.errors import ExportError
from export.source import Folder
from transformers import CLIPTokenizer


def _run(pipeline, prompt: str, **more: object):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(prompt, num_inference_steps=3, output_type="np", generator=generator, **more).images[0]


def test_a_base_checkpoint_runs_and_its_pictures_follow_the_prompt(checkpoints: dict[str, Path]) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(checkpoints["beta"])
    cat, dog = (_run(pipeline, prompt, height=96, width=96) for prompt in ("a cat", "a dog on the beach"))
    assert cat.shape == (96, 96, 3)
    assert cat.std() > 0.02
    assert abs(cat - dog).mean() > 0.002


def test_a_refiner_checkpoint_runs_and_is_recognised(checkpoints: dict[str, Path]) -> None:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(checkpoints["alpha-refiner"])
    picture = _run(pipeline, "a cat", image=torch.rand(1, 3, 64, 64), strength=0.7)
    assert picture.shape == (64, 64, 3)
    checkpoint = sdxl.read(Folder(checkpoints["alpha-refiner"]))
    assert (checkpoint.role, checkpoint.unet["time_ids"]) == ("refiner", 5)
    assert [encoder.component for encoder in checkpoint.encoders] == ["text_encoder_2"]


def test_the_tokenizer_is_clips(checkpoints: dict[str, Path]) -> None:
    first, second = (CLIPTokenizer.from_pretrained(checkpoints["beta"] / name) for name in ("tokenizer", "tokenizer_2"))
    vocabulary = tokens.vocabulary(tokens.learn(240))
    end = vocabulary[tokens.END]
    assert end == max(vocabulary.values()) == len(vocabulary) - 1
    ids = first("A photo of the CAT, Straße 12!").input_ids
    assert ids[0] == vocabulary[tokens.START]
    assert ids[-1] == end
    assert end not in ids[:-1]
    assert second.pad_token_id == vocabulary["!"] == 0
    assert first.pad_token_id == end
    assert len(first("cat " * 100, truncation=True).input_ids) == 40


def test_a_checkpoint_is_the_same_every_time(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    tiny.write("gamma", tmp_path / "gamma")
    for path in (tmp_path / "gamma").rglob("*.safetensors"):
        relative = path.relative_to(tmp_path / "gamma")
        assert path.read_bytes() == (checkpoints["gamma"] / relative).read_bytes()


def test_unknown_names_and_full_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="alpha-refiner"):
        tiny.write("nothing", tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="not empty"):
        tiny.write("beta", tmp_path)
