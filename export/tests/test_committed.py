"""The graphs and entries that are committed at the repository's root."""

from __future__ import annotations

import gzip
from pathlib import Path

import onnx
import pytest
import yaml
from conftest import ROOT, TINY
from export import build, catalogue, emulate, run, sdxl, trace, variants
from export.dialects import DIALECTS
from export.source import Declared, Folder, Source

TODAY = {"tiny": {"text_encoder_2", "vae_encoder"}, "tiny-refiner": {"text_encoder_2"}, "sdxl-base": {"vae_decoder"}}


def _whole(root: Path) -> dict[str, dict]:
    return {name: entry for name, entry in catalogue.models(root / "models.yaml").items() if "like" not in entry}


MODELS = {**_whole(ROOT), **_whole(TINY)}
PLACES = {**dict.fromkeys(_whole(ROOT), ROOT), **dict.fromkeys(_whole(TINY), TINY)}
"""The folder at which each model's paths begin."""


@pytest.mark.parametrize("name", MODELS)
def test_every_graph_is_there_small_and_weight_free(name: str) -> None:
    for component, section in MODELS[name]["graphs"].items():
        assert {"weights", "fused", "plain"} <= section.keys() <= {"weights", *DIALECTS}
        for dialect in section.keys() - {"weights"}:
            data = gzip.decompress((PLACES[name] / section[dialect]).read_bytes())
            assert len(data) <= 4 << 20
            model = onnx.load_from_string(data)
            trace.check(model)
            assert model.metadata_props[0].value == component
    assert not [text for text in MODELS[name]["text"] if text["tokenizer"]["length"] != 77]


def test_all_graphs_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "graphs").rglob("*.gz")) <= 12 << 20


def test_sdxl_has_its_published_sizes() -> None:
    base, refiner = MODELS["sdxl-base"], MODELS["sdxl-refiner"]
    assert base["unet"]["kv"] == {640: 10, 1280: 60}
    assert (base["unet"]["time_ids"], refiner["unet"]["time_ids"]) == (6, 5)
    assert (base["vae"]["scale"], base["defaults"]["width"]) == (8, 1024)
    graphs = [gzip.decompress((ROOT / base["graphs"][name]["fused"]).read_bytes()) for name in ("unet", "kv")]
    wanted = [trace.initializers(data) for data in graphs]
    assert [len(names) for names in wanted] == [1540, 140]
    total = 0
    for shape in (shape for names in wanted for shape in names.values()):
        count = 1
        for dim in shape:
            count *= dim
        total += count
    assert total == 2_567_463_684


def test_sdxl_has_a_kernel_for_every_fusion_on_cuda() -> None:
    for name, layers in (("sdxl-base", 70), ("sdxl-refiner", 44)):
        path = MODELS[name]["graphs"]["unet"].get("cuda")
        if path is None:
            pytest.skip("not exported yet: make graphs")
        graph = onnx.load_from_string(gzip.decompress((ROOT / path).read_bytes())).graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("BiasSplitGelu") == layers
        assert kinds.count("MultiHeadAttention") == 2 * layers
        assert not {"InstanceNormalization", "Gelu"} & set(kinds)


def test_committed_files_name_no_machine() -> None:
    text = "".join((root / "models.yaml").read_text(encoding="utf-8") for root in (ROOT, TINY))
    assert not [line for line in text.splitlines() if line.strip().split(": ")[-1].startswith("/")]


@pytest.mark.parametrize(("name", "components"), TODAY.items())
def test_the_graphs_are_what_the_exporter_makes_today(name: str, components: set[str]) -> None:
    """Full-size ones too, as far as seconds suffice; `make graphs` makes them all."""
    folder = TINY / name
    source: Source = Folder(folder) if folder.is_dir() else Declared(run.CONFIGS / name)
    checkpoint = sdxl.read(source)
    some = [graph for graph in checkpoint.graphs() if graph.component in components]
    assert len(some) == len(components)
    known = [dialect for dialect in DIALECTS if all(dialect in MODELS[name]["graphs"][c] for c in components)]
    for component, lowered in build.all_of(checkpoint, known, some).items():
        for dialect, data in lowered.items():
            assert trace.compress(data) == (PLACES[name] / MODELS[name]["graphs"][component][dialect]).read_bytes()


@pytest.mark.parametrize("model", variants.described())
def test_variants_and_loras_are_those_that_come_with_the_exporter(model: str) -> None:
    data = yaml.safe_load((ROOT / "models.yaml").read_text(encoding="utf-8"))
    published = list(variants.entries(model, data["models"][model]["family"]))
    assert published
    for section, name, entry in published:
        assert data[section][name] == entry
    assert {name for section, name, _ in published if section == "models"} == {
        name for name, entry in data["models"].items() if entry.get("like") == model
    }


def test_both_tiny_models_have_the_same_autoencoder() -> None:
    for component in ("vae_encoder", "vae_decoder"):
        for dialect in DIALECTS:
            base, refiner = (MODELS[name]["graphs"][component][dialect] for name in ("tiny", "tiny-refiner"))
            assert (TINY / base).read_bytes() == (TINY / refiner).read_bytes()


def test_the_rust_tests_graph_is_the_tiny_models_with_its_operators_spelt_out() -> None:
    committed = gzip.decompress((TINY / MODELS["tiny"]["graphs"]["unet"]["cuda"]).read_bytes())
    golden = gzip.decompress((ROOT / "tests" / "golden" / "half" / "unet.onnx.gz").read_bytes())
    assert golden == emulate.on_cpu(committed)
