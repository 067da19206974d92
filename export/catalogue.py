"""Reads models.yaml, and writes one entry of it and leaves the rest of the file as it is."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import yaml

from export.errors import ExportError

FORMAT = 1
_HEADER = (
    "# What the engine knows about models. Entries are written by `python -m export model`;"
    " paths are relative to this file.\n"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENTRY = re.compile(r"  ([^\s#][^:]*):\s*(#.*)?$")


class _Dumper(yaml.SafeDumper):
    """Indented lists, no aliases; floats always carry a point, so that YAML 1.1 and 1.2 read them as floats."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def dump(value: object, indent: int = 0) -> str:
    """Block YAML of `value`, every line indented."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return "".join(" " * indent + line for line in text.splitlines(keepends=True))


def check_name(name: str) -> None:
    """Refuses names that are no plain YAML key or file name."""
    if not _NAME.fullmatch(name):
        raise ExportError(f"--name {name!r}: letters, digits, `.`, `_`, `-`, beginning with a letter or digit")


def put(path: Path, name: str, entry: dict, section: str = "models") -> None:
    """Writes or replaces the entry `name` in a section of the catalogue at `path`, atomically."""
    check_name(name)
    text = path.read_text(encoding="utf-8") if path.exists() else f"{_HEADER}format: {FORMAT}\nmodels:\n"
    data = _load(path, text)
    if section not in data:
        text = f"{text.rstrip()}\n{section}:\n"
    wanted = {**data, section: {**(data.get(section) or {}), name: entry}}
    block = f"  {name}:\n{dump(entry, 4)}"
    new = _splice(text, section, name, block)
    if new is None or yaml.safe_load(new) != wanted:
        raise ExportError(f"{path}: `{section}:` is not laid out one entry per block with two spaces; rewrite it so")
    write(path, new.encode("utf-8"))


def models(path: Path) -> dict[str, dict]:
    """The entries of the catalogue at `path`; those of variants are whole, and say `like` too."""
    if not path.exists():
        raise ExportError(f"{path}: no such file; --out names the folder of models.yaml")
    written = _load(path, path.read_text(encoding="utf-8")).get("models") or {}
    return {name: _whole(path, name, written) for name in written}


def _whole(path: Path, name: str, written: dict[str, dict], below: tuple[str, ...] = ()) -> dict:
    """An entry with what the one that it is like says."""
    entry = written[name]
    if "like" not in entry:
        return entry
    like = entry["like"]
    if like not in written or like in (name, *below):
        known = ", ".join(other for other in written if other != name)
        raise ExportError(
            f"{path}: {name} is like {like}, which is no other model there, or one like it; known: {known}"
        )
    base = _whole(path, like, written, (name, *below))
    parts = ("weights", "scheduler", "defaults")
    changed = {key: {**base[key], **entry[key]} for key in parts if key in entry}
    if "weights" in entry:
        # Who made the base has not licensed these.
        base = {key: value for key, value in base.items() if key != "licence"}
    return {**base, **entry, **changed}


def check(path: Path) -> None:
    """Refuses a file that is there and no catalogue, before anything expensive is done for an entry of it."""
    if path.exists():
        _load(path, path.read_text(encoding="utf-8"))


def _load(path: Path, text: str) -> dict:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExportError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ExportError(f"{path}: `format` must be {FORMAT}")
    return data


def _splice(text: str, section: str, name: str, block: str) -> str | None:
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    start = next((i for i, line in enumerate(lines) if re.match(rf"{section}:\s*(\{{\}})?\s*(#.*)?$", line)), None)
    if start is None:
        return None
    lines[start] = lines[start].replace(" {}", "")
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[^\s#]", lines[i])), len(lines))
    first, last = end, end
    for i in range(start + 1, end):
        if match := _ENTRY.match(lines[i]):
            if match[1].strip("\"'") == name:
                first = i
            elif first < i and last == end:
                last = i
    # Comments and blank lines above the next entry belong to that entry.
    while first < last < end and not lines[last - 1].startswith("    "):
        last -= 1
    return "".join([*lines[:first], block, *lines[last:]])


def write(path: Path, data: bytes) -> None:
    """Replaces a file in one step: it is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
