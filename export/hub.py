"""Talks to the hub: what a repository lists, its files and their headers, by way of `huggingface_hub` and its cache."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import ExportError

# The format's own limit.
_LONGEST_HEADER = 100_000_000


def listing(repo: str, revision: str | None) -> list[str]:
    """The names of all files of a repository, with `/` between folder and file."""
    from huggingface_hub import HfApi

    with _failures(repo, revision):
        return HfApi().list_repo_files(repo, revision=revision)


def download(repo: str, name: str, revision: str | None) -> Path:
    """One file of a repository on this machine, from the cache when it is there."""
    from huggingface_hub import hf_hub_download

    with _failures(repo, revision, name):
        return Path(hf_hub_download(repo, name, revision=revision))


def header(repo: str, name: str, revision: str | None) -> bytes:
    """The JSON header of a safetensors file: a few KiB of it, and none of its weights."""
    from huggingface_hub import hf_hub_url

    with _failures(repo, revision, name):
        url = hf_hub_url(repo, name, revision=revision)
        (length,) = struct.unpack("<Q", _part(url, 0, 8))
        if length > _LONGEST_HEADER:
            raise ValueError("it is not a safetensors file")
        return _part(url, 8, length)


def _part(url: str, start: int, count: int) -> bytes:
    """`count` bytes of a file. A server that knows no ranges sends all of it, and is left as soon as they are here."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + count:
                return bytes(data[skip : skip + count])
    raise ValueError(f"it ends after {start + max(len(data) - skip, 0)} bytes, within its header")


@contextmanager
def _failures(repo: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    """One line for whatever goes wrong. The library lets its HTTP client's errors through, and that client changes."""
    from huggingface_hub import constants, errors

    what = repo if name is None else f"{repo}: {name}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ExportError(
            f"{what}: gated; accept its terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ExportError(
            f"{what}: neither a folder here nor a repository at {constants.ENDPOINT}; check the name, and set HF_TOKEN "
            "if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ExportError(f"{what}: no revision {revision!r}; --revision is a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise ExportError(f"{what}: no folder, and no hub id either: {_line(error)}") from error
    except Exception as error:
        # Without the cause, a failed look-up of a file only says to check the connection.
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        raise ExportError(
            f"{what}: {constants.ENDPOINT} did not give it: {_line(cause)}; check the connection and HF_ENDPOINT"
        ) from error


def _line(error: BaseException) -> str:
    """An error on one line; the library writes several, with blank ones between them."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
