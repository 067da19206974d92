"""Checkpoints by hub id, from a server that answers as the hub does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import Exported
from export import trace
from export.dialects import DIALECTS
from export.source import read_header
from hub_server import PAGE, Run, Server, large, serving
from safetensors.torch import load, load_file, save

REPO, AGED = "someone/painter", "someone/old-painter"
UNET = "diffusion_pytorch_model"
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
# Lists and resolves as the command line does, but without torch: a second instead of many.
OPEN = """
import sys
from export.errors import ExportError
from export.source import open_source
try:
    source = open_source(sys.argv[1], revision=sys.argv[2] or None)
    source.json("model_index.json")
    print([file.file for file in source.weights("unet")], len(source.header("unet")))
except ExportError as error:
    sys.exit(f"error: {error}")
"""
# Several command lines after one another, each on some of the graphs only: loading torch and tracing take seconds each.
SOME = """
import contextlib, io, json, sys
from export import __main__, sdxl
every = sdxl.Checkpoint.graphs
sdxl.Checkpoint.graphs = lambda checkpoint: [graph for graph in every(checkpoint) if graph.component in names]
ends = []
for names, command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = __main__.main(command)
    ends.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(ends))
"""


def _as_on_the_hub(beta: Path) -> dict[str, bytes]:
    """Beta with a half variant of all but its second encoder, and the UNet in shards."""
    files = {path.relative_to(beta).as_posix(): path.read_bytes() for path in beta.rglob("*") if path.is_file()}

    def put(name: str, tensors: dict) -> None:
        files[name] = save(tensors, metadata={"format": "pt"})

    for component, stem in (("text_encoder", "model"), ("vae", UNET)):
        tensors = load_file(beta / component / f"{stem}.safetensors")
        put(f"{component}/{stem}.fp16.safetensors", {name: tensor.half() for name, tensor in tensors.items()})
    whole = load_file(beta / "unet" / f"{UNET}.safetensors")
    del files[f"unet/{UNET}.safetensors"]
    for variant, dotted in (("", ""), (".fp16", ".fp16")):
        shards = [f"{UNET}{variant}-{i:05}-of-00002.safetensors" for i in (1, 2)]
        place = {name: shards[i % 2] for i, name in enumerate(sorted(whole))}
        index = {"metadata": {}, "weight_map": place}
        files[f"unet/{UNET}.safetensors.index{dotted}.json"] = json.dumps(index).encode()
        for shard in shards:
            tensors = {name: whole[name] for name, where in place.items() if where == shard}
            put(f"unet/{shard}", {name: tensor.half() for name, tensor in tensors.items()} if variant else tensors)
    return {**files, "README.md": b"# A painter\n", "assets/example.png": b"\x89PNG"}


def _aged(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The same with one file's tensors under the names that they had before diffusers 0.18."""
    tensors = load(files[name])
    for new, old in OLD.items():
        tensors = {tensor.replace(new, old): value for tensor, value in tensors.items()}
    return {**files, name: save(tensors, metadata={"format": "pt"})}


@pytest.fixture(scope="module")
def files(checkpoints: dict[str, Path]) -> dict[str, bytes]:
    return _as_on_the_hub(checkpoints["beta"])


@pytest.fixture
def server(files: dict[str, bytes], tmp_path: Path) -> Iterator[Server]:
    with serving({REPO: files}, tmp_path) as server:
        yield server


@dataclass(frozen=True)
class Session:
    """An export, one with --verify, and one of a repository that does not exist."""

    server: Server
    plain: Run
    verified: Run
    unknown: Run

    @property
    def out(self) -> Path:
        return self.server.home / "out"

    def entry(self, name: str) -> dict:
        return yaml.safe_load((self.out / "models.yaml").read_text(encoding="utf-8"))["models"][name]


@pytest.fixture(scope="module")
def session(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    home = tmp_path_factory.mktemp("hub")
    common = ["--variant", "fp16", "--out", str(home / "out")]
    commands = [
        (["text_encoder"], ["model", REPO, "--name", "plain", *common]),
        (["kv", "vae_decoder"], ["model", AGED, "--name", "verified", *common, "--revision", "v1", "--verify"]),
        ([], ["model", "someone/nothing", "--name", "unknown", *common]),
    ]
    with serving({REPO: files, AGED: _aged(files, f"vae/{UNET}.fp16.safetensors")}, home) as server:
        run = server.run("-c", SOME, json.dumps(commands))
        assert run.status == 0, run.stderr
        yield Session(server, *(Run(*end) for end in json.loads(run.stdout)))


def _reference(*names: str) -> list[dict[str, str]]:
    return [{"repo": REPO, "file": name} for name in names]


def _header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_an_export_by_hub_id_fetches_no_weights(session: Session) -> None:
    assert session.plain.status == 0, session.plain.stderr
    server = session.server
    files, sent = server.repos[REPO], server.sent[REPO]
    assert any(name.endswith("vocab.json") for name in sent)
    assert all(name.endswith(".json") or large(name) for name in sent), sent
    # Of weights no more than the header, to learn the tensors' names.
    (read,) = session.entry("plain")["weights"]["text_encoder"]
    assert {name: sent[name] for name in sent if large(name)} == {read["file"]: _header_length(files[read["file"]])}
    assert server.snapshot(REPO).is_dir()
    assert not list(server.snapshot(REPO).rglob("*.safetensors"))
    assert server.pages[REPO] == -(-len(files) // PAGE)


def test_the_entry_names_files_of_the_repository(session: Session) -> None:
    entry = session.entry("plain")
    assert entry["origin"] == REPO
    assert entry["weights"] == {
        "text_encoder": _reference("text_encoder/model.fp16.safetensors"),
        "text_encoder_2": _reference("text_encoder_2/model.safetensors"),
        "unet": _reference(*(f"unet/{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2))),
        "vae": _reference(f"vae/{UNET}.fp16.safetensors"),
    }
    for folder, text in zip(("tokenizer", "tokenizer_2"), entry["text"], strict=True):
        files = [text["tokenizer"]["vocab"], text["tokenizer"]["merges"]]
        assert files == _reference(f"{folder}/vocab.json", f"{folder}/merges.txt")
    (vae,) = session.entry("verified")["weights"]["vae"]
    assert vae == {"repo": AGED, "file": f"vae/{UNET}.fp16.safetensors", "revision": "v1"}


def test_a_second_export_gives_the_folders_graphs_byte_for_byte(session: Session, exports: dict[str, Exported]) -> None:
    beta = exports["beta"]
    pairs = {
        (component, dialect): (session.out / path, beta.out / beta.entry["graphs"][component][dialect])
        for name in ("plain", "verified")
        for component, files in session.entry(name)["graphs"].items()
        for dialect, path in files.items()
        if dialect != "weights"
    }
    same = {key for key, (ours, theirs) in pairs.items() if ours.read_bytes() == theirs.read_bytes()}
    assert same == {(component, dialect) for component in ("text_encoder", "kv") for dialect in DIALECTS}
    # The third one has other names in its file.
    assert pairs.keys() - same == {("vae_decoder", dialect) for dialect in DIALECTS}


def test_with_verify_the_weights_of_the_graphs_come(session: Session) -> None:
    assert session.verified.status == 0, session.verified.stdout + session.verified.stderr
    server, weights = session.server, session.entry("verified")["weights"]
    files, sent = server.repos[AGED], server.sent[AGED]
    wanted = {file["file"] for key in ("unet", "vae") for file in weights[key]}
    assert {name for name in sent if large(name)} == wanted
    assert all(sent[name] == len(files[name]) + _header_length(files[name]) for name in wanted)


def test_tensors_under_names_of_old_are_found_in_the_header(session: Session) -> None:
    path = session.out / session.entry("verified")["graphs"]["vae_decoder"]["plain"]
    found = trace.initializers(gzip.decompress(path.read_bytes()))
    stored = read_header(session.server.snapshot(AGED) / f"vae/{UNET}.fp16.safetensors")
    assert any(".query." in name for name in found)
    assert found.items() <= stored.items()


def test_an_unknown_repository_is_one_line(session: Session) -> None:
    assert (session.unknown.status, session.unknown.stdout) == (1, "")
    (line,) = session.unknown.stderr.splitlines()
    assert line.startswith("error: someone/nothing: ")
    assert session.server.endpoint in line
    assert "HF_TOKEN" in line
    assert not (session.out / "graphs" / "unknown").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_without_variant_the_plain_shards_are_found(server: Server, ranges: bool) -> None:
    server.ranges = ranges
    run = server.run("-c", OPEN, REPO, "")
    assert run.status == 0, run.stderr
    shards = [f"unet/{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert run.stdout.strip() == f"{shards} {sum(len(load(server.repos[REPO][shard])) for shard in shards)}"


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x63" + b"\0" * 7 + b"{"],
    ids=["empty", "no length", "too long", "no object", "cut off"],
)
def test_weights_that_are_none_are_named_on_one_line(server: Server, content: bytes) -> None:
    name = f"unet/{UNET}-00001-of-00002.safetensors"
    server.repos = {REPO: {**server.repos[REPO], name: content}}
    run = server.run("-c", OPEN, REPO, "")
    assert run.status == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {REPO}: {name}: ")


def test_what_the_hub_refuses_is_one_line_with_the_remedy(server: Server) -> None:
    cases = {
        ("someone/gated", "", server.endpoint): "accept its terms",
        (REPO, "v9", server.endpoint): "--revision",
        ("some one/bad..id", "", server.endpoint): "hub id",
        (REPO, "", "localhost:1"): "HF_ENDPOINT",
        ("someone", "", server.endpoint): "owner/name",
    }
    running = {case: server.start("-c", OPEN, *case[:2], HF_ENDPOINT=case[2]) for case in cases}
    for case, process in running.items():
        stdout, err = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (1, ""), case
        assert len(err.splitlines()) == 1, err
        assert err.startswith(f"error: {case[0]}"), err
        assert cases[case] in err


def test_a_repository_in_another_layout_is_named_with_the_missing_file(server: Server) -> None:
    server.repos = {REPO: {name: data for name, data in server.repos[REPO].items() if name != "model_index.json"}}
    run = server.run("-c", OPEN, REPO, "")
    assert run.status == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {REPO}: model_index.json is missing")
