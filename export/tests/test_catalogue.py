"""models.yaml: what an entry says and what happens to the rest of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Exported
from export import catalogue
from export.__main__ import main
from export.dialects import DIALECTS
from export.errors import ExportError

KEYS = [
    "family",
    "role",
    "origin",
    "weights",
    "graphs",
    "text",
    "unet",
    "vae",
    "force_zeros_for_empty_prompt",
    "requires_aesthetics_score",
    "scheduler",
    "defaults",
]
FILE = """\
# header
format: 1
models:
  # about the first
  first:
    family: sdxl   # kept as it is
    vae: {scaling_factor: 0.13025}

  # about the second
  second:
    family: sdxl
"""


def _data(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_an_entry_has_the_contracts_keys_and_relative_files_that_exist(exported: Exported) -> None:
    entry = exported.entry
    assert list(entry) == KEYS
    paths = [path for files in entry["weights"].values() for path in files]
    for section in entry["graphs"].values():
        assert section["weights"] in entry["weights"]
        paths += [section[dialect] for dialect in DIALECTS]
    for text in entry["text"]:
        paths += [text["tokenizer"]["vocab"], text["tokenizer"]["merges"]]
    assert all(not Path(path).is_absolute() and (exported.out / path).is_file() for path in paths)


def test_facts_follow_from_the_configs(exports: dict[str, Exported]) -> None:
    beta, gamma = exports["beta"].entry, exports["gamma"].entry
    assert beta["role"] == gamma["role"] == "base"
    assert (beta["unet"]["time_ids"], beta["unet"]["pooled_dim"], beta["unet"]["in_channels"]) == (6, 36, 6)
    assert (beta["vae"]["scale"], gamma["vae"]["scale"]) == (4, 2)
    assert gamma["vae"]["latents_mean"] == [0.1, -0.2, 0.3, 0.05]
    assert beta["text"][0]["tokenizer"]["length"] == 40
    assert beta["text"][0]["tokenizer"]["pad"] == beta["text"][0]["tokenizer"]["eos"]
    assert beta["text"][1]["tokenizer"]["pad"] == 0
    assert [text["pooled"] for text in beta["text"]] == [False, True]
    assert [text["encoder"] for text in gamma["text"]] == ["text_encoder_2"]
    assert len(gamma["weights"]["unet"]) > 1
    assert beta["defaults"] == {"width": 96, "height": 96, "steps": 50, "guidance": 5.0, "scheduler": "euler"}
    assert "_diffusers_version" not in beta["scheduler"]


def test_replacing_an_entry_leaves_others_and_comments_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(FILE, encoding="utf-8")
    catalogue.put(path, "first", {"family": "new"})
    text = path.read_text(encoding="utf-8")
    assert text == FILE.replace(
        "    family: sdxl   # kept as it is\n    vae: {scaling_factor: 0.13025}\n", "    family: new\n"
    )
    catalogue.put(path, "third", {"family": "added"})
    assert path.read_text(encoding="utf-8") == text + "  third:\n    family: added\n"
    catalogue.put(path, "third", {"family": "again"})
    assert _data(path)["models"]["third"] == {"family": "again"}
    assert list(_data(path)["models"]) == ["first", "second", "third"]


def test_another_section_is_made_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(FILE, encoding="utf-8")
    catalogue.put(path, "a", {"family": "sdxl"}, "loras")
    assert path.read_text(encoding="utf-8") == FILE + "loras:\n  a:\n    family: sdxl\n"
    catalogue.put(path, "third", {"family": "added"})
    catalogue.put(path, "b", {"file": "b"}, "loras")
    catalogue.put(path, "a", {"file": "a"}, "loras")
    added = "  third:\n    family: added\nloras:\n  a:\n    file: a\n  b:\n    file: b\n"
    assert path.read_text(encoding="utf-8") == FILE + added


def _written(folder: Path, **models: dict) -> Path:
    path = folder / "models.yaml"
    for name, entry in models.items():
        catalogue.put(path, name, entry)
    return path


BASE = {
    "role": "base",
    "licence": "MIT",
    "weights": {"unet": ["a"], "vae": ["b"]},
    "scheduler": {"x": 1, "y": 2},
    "defaults": {"steps": 50, "guidance": 5.0},
}


def test_a_variant_has_what_it_does_not_say(tmp_path: Path) -> None:
    fast = {"like": "base", "scheduler": {"y": 3}, "defaults": {"steps": 4}}
    other = {"like": "fast", "weights": {"unet": ["c"]}, "defaults": {"guidance": 0.0}}
    path = tmp_path / "models.yaml"
    models = yaml.safe_dump({"other": other, "base": BASE, "fast": fast}, sort_keys=False)
    path.write_text("format: 1\nmodels:\n" + "".join(f"  {line}\n" for line in models.splitlines()), encoding="utf-8")
    models = catalogue.models(path)
    scheduler, defaults = {"x": 1, "y": 3}, {"steps": 4, "guidance": 5.0}
    assert models["base"] == BASE
    assert models["fast"] == {**BASE, "like": "base", "scheduler": scheduler, "defaults": defaults}
    assert models["other"]["like"] == "fast"
    assert models["other"]["weights"] == {"unet": ["c"], "vae": ["b"]}
    assert models["other"]["defaults"] == {"steps": 4, "guidance": 0.0}
    assert "licence" not in models["other"]
    assert models["other"]["scheduler"] == scheduler
    # Written as it was.
    catalogue.put(path, "fourth", BASE)
    assert _data(path)["models"]["other"] == other


@pytest.mark.parametrize(
    "models", [{"a": {"like": "b"}}, {"a": {"like": "a"}}, {"a": {"like": "b"}, "b": {"like": "a"}}]
)
def test_variants_of_nothing_are_refused(tmp_path: Path, models: dict) -> None:
    with pytest.raises(ExportError, match=r"models\.yaml: . is like ., which is no other model"):
        catalogue.models(_written(tmp_path, **models))


def test_variants_are_entered_beside_their_base_only(tmp_path: Path) -> None:
    path = _written(tmp_path, other=BASE)
    arguments = ["variants", "sdxl-base", "--out", str(tmp_path)]
    assert main(arguments) == 1
    _written(tmp_path, **{"sdxl-base": {**BASE, "family": "sdxl"}})
    assert main(arguments) == 0
    text = path.read_text(encoding="utf-8")
    models = catalogue.models(path)
    for steps in (1, 2, 4, 8):
        entry = models[f"sdxl-lightning-{steps}step"]
        assert entry["weights"]["vae"] == ["b"]
        assert entry["weights"]["unet"][0]["repo"] == entry["origin"] == "ByteDance/SDXL-Lightning"
        assert entry["defaults"] == {"steps": steps, "guidance": 0.0, "scheduler": "euler"}
        assert entry["distilled_steps"] == steps
        assert entry["scheduler"]["timestep_spacing"] == "trailing"
        assert entry["scheduler"].get("prediction_type") == ("sample" if steps == 1 else None)
    assert list(_data(path)["loras"]) == [f"lightning-{steps}step" for steps in (2, 4, 8)]
    assert main(arguments) == 0
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("value", [1e-05, 0.13025, 1e20, 5.0, 1 / 3, 0.00085])
def test_floats_come_back_exactly_and_carry_a_point(tmp_path: Path, value: float) -> None:
    path = tmp_path / "models.yaml"
    catalogue.put(path, "m", {"value": value})
    assert _data(path)["models"]["m"]["value"] == value
    assert "." in path.read_text(encoding="utf-8").split("value: ")[1]


@pytest.mark.parametrize("text", ["format: 2\nmodels:\n", "models: [", "format: 1\nmodels: {a: {b: 1}}\n", "7\n"])
def test_a_file_it_cannot_keep_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=r"models\.yaml"):
        catalogue.put(path, "m", {})
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "a:b"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="--name"):
        catalogue.put(tmp_path / "models.yaml", name, {})


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    catalogue.write(tmp_path / "a" / "b", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
