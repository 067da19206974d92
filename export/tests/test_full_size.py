"""The comparison with torch, end to end on a tiny checkpoint, and its bars and refusals on given figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, Exported, built

BENCHES = ROOT / "benches"


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(BENCHES)
    return {name: importlib.import_module(name) for name in ("bars", "cgroup", "checkpoint")}


def full_size(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHES / "full_size.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def low(size: int, anonymous: float) -> dict:
    load = {"unet-load-seconds": 6.0, "unet-load-anonymous-bytes": 0.3e9}
    return {"size": size, "denoise-anonymous-bytes": anonymous, **load}


@built
def test_a_tiny_checkpoint_is_compared_in_one_run(exports: dict[str, Exported], tmp_path: Path):
    beta, file = exports["beta"], tmp_path / "result.json"
    few = ["--size", 64, "--large", 128, "--rounds", 2, "--forwards", 1, "--threads", 1, "--no-work"]
    where = ["--models", beta.out / "models.yaml", "--model", "beta", "--checkpoint", beta.folder]
    run = full_size(*where, *few, "--json", file)
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert list(result["speed"]) == ["torch", "fast", "low"]
    for name, times in result["speed"].items():
        for network in ("unet", "vae"):
            assert len(times[network]["samples"]) == 2, name
            assert 0 < times[network]["seconds-least"] <= times[network]["seconds"] <= times[network]["seconds-largest"]
    assert result["speed"]["torch"]["unet"]["ratio-to-torch"] == 1
    assert [row["size"] for row in result["low"]] == [64, 128]
    assert result["latents-largest-relative-difference"] < 1e-5
    assert {bar["what"]: bar["holds"] for bar in result["bars"]}["denoising at 512×512, low: anonymous"] is None
    assert "measured bars hold" in run.stdout


def test_a_median_is_of_all_rounds_and_a_ratio_of_each(benches: dict[str, ModuleType]):
    samples = benches["bars"].Samples
    summary = samples([[1.0, 1.0], [4.0, 3.0, 3.0]]).summary(samples([[2.0], [2.0]]))
    assert summary["seconds"] == 3.0
    assert (summary["seconds-least"], summary["seconds-largest"]) == (1.0, 4.0)
    assert (summary["ratio-to-torch"], summary["ratio-least"], summary["ratio-largest"]) == (1.5, 0.5, 1.5)


def test_a_bar_holds_up_to_its_value_and_is_not_measured_without_one(benches: dict[str, ModuleType]):
    bars = benches["bars"]
    ratio = {"ratio-to-torch": 0.87, "ratio-least": 0.8, "ratio-largest": 0.9}
    speed = {"torch": {}, "fast": {"unet": ratio, "vae": ratio, "outside-runtime-share": 0.011}}
    found = bars.of(speed, [low(512, 0.8e9), low(1024, 2.1e9)])
    holds = [True, None, False, False, True, True, False, False]
    assert [bar.holds for bar in found] == holds
    table = bars.bar_table(found)
    assert table.count("**no**") == 4
    assert table.count("not measured") == 1
    assert bars.verdict(found).startswith("3 of 7 measured bars hold; missed: VAE decode, fast")


def test_what_cannot_be_measured_is_refused(exports: dict[str, Exported], tmp_path: Path):
    models = exports["beta"].out / "models.yaml"
    cases = {
        "is not in": ["--models", models, "--model", "nobody"],
        "no such folder": ["--models", models, "--model", "beta", "--checkpoint", tmp_path / "none"],
        "multiples of 8": ["--models", models, "--size", 63],
        "--only-cgroup wants": ["--models", models, "--only-cgroup"],
        "modes are": ["--models", models, "--modes", "quick"],
    }
    for message, words in cases.items():
        run = full_size(*words)
        assert run.returncode == 2
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_a_cgroup_wants_root(benches: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(benches["checkpoint"].RefusedError, match="needs root"):
        benches["cgroup"].Cgroup.controller()


def test_weights_are_those_of_the_index_or_the_only_file(benches: dict[str, ModuleType], tmp_path: Path):
    checkpoint = benches["checkpoint"]
    with pytest.raises(checkpoint.RefusedError, match="there are: none"):
        checkpoint.Checkpoint.found(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(checkpoint.RefusedError, match=r"a\.safetensors, b\.safetensors"):
        checkpoint.Checkpoint.found(tmp_path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "b.safetensors", "v": "b.safetensors"}}), encoding="utf-8")
    assert checkpoint.Checkpoint.found(tmp_path) == [tmp_path / "b.safetensors"]
