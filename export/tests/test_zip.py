"""ZipLoRA's mergers: learned by gradients, worked out in closed form, kept in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from export import tiny, zip_closed
from export import zip as ziplora
from export.__main__ import main
from export.errors import ExportError
from export.golden import zip as planted
from export.zip_lora import BOTH, CONTENT, STYLE, Zip
from safetensors.torch import load_file, save_file
from scipy.optimize import approx_fprime

PROMPTS = {CONTENT: "a photo of a small dog in a bucket", STYLE: "waves, an ink painting"}
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with a content and a style LoRA."""
    folder = tmp_path_factory.mktemp("zip")
    tiny.write("tiny", folder / "model")
    return {"model": folder / "model", **planted.plant(folder / "model", folder)}


@pytest.fixture
def zipped(files: dict[str, Path]) -> Zip:
    return Zip(ziplora.open_model(str(files["model"]), "f32", "cpu"), files[CONTENT], files[STYLE])


@pytest.fixture
def both(zipped: Zip) -> list[ziplora.Side]:
    settings = ziplora.Settings(samples=2, sample_steps=2, size=64)
    return ziplora.sides(zipped, PROMPTS, dict.fromkeys(BOTH), settings)


def _predictions(zipped: Zip, both: list[ziplora.Side]) -> Iterator[torch.Tensor]:
    timestep, noised = next(ziplora.places(zipped, both, 3))
    for side, x in zip(both, noised, strict=True):
        with torch.no_grad():
            yield side.predict(zipped, BOTH, x, timestep)


def test_the_published_objective_keeps_more_than_addition(zipped: Zip, both: list[ziplora.Side]) -> None:
    before = ziplora.lost(zipped, both, 1, 4)
    losses: list[float] = []
    settings = ziplora.Settings(steps=40, lr=0.02, seed=0)
    ziplora.learn(zipped, both, settings, lambda _, loss: losses.append(loss))
    after = ziplora.lost(zipped, both, 1, 4)
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5])
    assert sum(after.values()) < 0.9 * sum(before.values())


def test_the_merged_file_is_a_lora_that_does_the_same(
    zipped: Zip, both: list[ziplora.Side], files: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    for mergers in zipped.mergers.values():
        for merger in mergers:
            merger.data = torch.rand_like(merger) * 2 - 0.5
    wanted = list(_predictions(zipped, both))
    zipped.save(tmp_path / "merged.safetensors")
    model = ziplora.open_model(str(files["model"]), "f32", "cpu")
    model.load_lora_weights(str(tmp_path), weight_name="merged.safetensors")
    timestep, noised = next(ziplora.places(zipped, both, 3))
    for side, x, expected in zip(both, noised, wanted, strict=True):
        embeds, _, pooled, _ = model.encode_prompt(PROMPTS[side.name], do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]).float()}
        with torch.no_grad():
            found = model.unet(x, timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]
        assert torch.allclose(found, expected, atol=2e-5)


def test_mergers_come_back_from_both_kinds_of_files(zipped: Zip, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kept = {}
    for name, mergers in zipped.mergers.items():
        for merger in mergers:
            merger.data = torch.rand_like(merger) * 2 - 0.5
        kept[name] = tuple(merger.data.clone() for merger in mergers)
    zipped.save_mergers(tmp_path / "mergers.safetensors")
    sums = {
        f"unet.unet.{name}.lora.weight": sum(zipped.update(name, side) * m for side, m in zip(BOTH, pair, strict=True))
        for name, pair in kept.items()
    }
    save_file({name: update.half() for name, update in sums.items()}, tmp_path / "merged.safetensors")
    for file, tolerance in (("mergers", 0.0), ("merged", 1e-3)):
        for mergers in zipped.mergers.values():
            for merger in mergers:
                merger.data.zero_()
        zipped.load_mergers(tmp_path / f"{file}.safetensors")
        for name, pair in zipped.mergers.items():
            # In 16 bits a faint column tells little of its mergers, and they matter as little.
            found = sum(zipped.update(name, side) * m.detach() for side, m in zip(BOTH, pair, strict=True))
            wanted = sums[f"unet.unet.{name}.lora.weight"]
            assert (found - wanted).norm() <= tolerance * wanted.norm()
            if tolerance == 0.0:
                assert all(torch.equal(m, k) for m, k in zip(pair, kept[name], strict=True))


def test_a_merged_update_of_other_loras_is_refused(zipped: Zip, tmp_path: Path) -> None:
    sums = {f"unet.{name}.lora.weight": torch.randn(zipped.update(name, STYLE).shape) for name in zipped.mergers}
    save_file(sums, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match="not made of these two"):
        zipped.load_mergers(tmp_path / "other.safetensors")


@pytest.mark.parametrize("similarity", [0.0, 0.01, 0.5])
def test_the_closed_form_is_the_minimum(similarity: float) -> None:
    draw = np.random.default_rng(0)
    updates = tuple(draw.normal(size=(5, 2)) @ draw.normal(size=(2, 7)) for _ in BOTH)
    moments = tuple(a.T @ a / 40 for a in (draw.normal(size=(40, 7)) * draw.uniform(0.1, 2, 7) for _ in BOTH))
    mergers = zip_closed.solve(*updates, *moments, ridge=0.05, similarity=similarity)

    def value(z: np.ndarray) -> float:
        return zip_closed.objective((z[:7], z[7:]), updates, moments, 0.05, similarity)

    found = np.concatenate(mergers)
    # Where a product is zero, |m_c m_s| has an edge, so the neighbourhood is asked and not the slope alone.
    assert value(found) < value(np.ones(14))
    if similarity == 0.0:
        assert np.abs(approx_fprime(found, value, 1e-6)).max() < 1e-4
    for _ in range(50):
        assert value(found) < value(found + draw.normal(size=14) * 0.3)


def test_the_command_writes_lora_and_mergers_and_refuses_what_makes_no_sense(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mergers = tmp_path / "out.safetensors", tmp_path / "mergers.safetensors"
    base = ["zip", "--model", str(files["model"]), "-o", str(out), "--content", str(files[CONTENT])]
    quick = ["--steps", "2", "--samples", "1", "--sample-steps", "1", "--size", "64", "--measure", "1"]
    prompts = [word for side, text in PROMPTS.items() for word in (f"--prompt-{side}", text)]
    style = ["--style", str(files[STYLE])]
    assert main([*base, *style, *prompts, *quick, "--save-mergers", str(mergers)]) == 0
    assert f"unet.{LAYER}.lora.merger_1" in load_file(mergers)
    first = out.read_bytes()
    assert main([*base, *style, "--mergers", str(mergers)]) == 0
    assert out.read_bytes() == first
    for arguments, words in (
        ([*base, "--style", str(files[CONTENT]), *prompts], "is --content too"),
        ([*base, *style, "--prompt-content", "a dog"], "--prompt-style: is empty"),
        ([*base, "--style", str(files["model"] / "unet" / "config.json"), *prompts], "is not a LoRA of this model"),
        ([*base, *style, "--mergers", str(files[STYLE])], "neither a merger nor"),
    ):
        capsys.readouterr()
        assert main(arguments) == 1
        assert words in capsys.readouterr().err
