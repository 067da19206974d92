"""A server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)
# Entries a page of a listing; the hub has a thousand.
PAGE = 7


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Server:
    """The hub with a few repositories; what it was asked for, and how many bytes of each file it sent."""

    repos: dict[str, dict[str, bytes]]
    home: Path
    endpoint: str = ""
    ranges: bool = True
    pages: Counter[str] = field(default_factory=Counter)
    sent: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def start(self, *command: object, **env: str) -> subprocess.Popen[str]:
        """Starts Python with this hub for the hub and a cache of its own."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1", **env}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)],
            cwd=ROOT,
            env={**plain, "OMP_NUM_THREADS": "1", **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object) -> Run:
        process = self.start(*command)
        out, err = process.communicate(timeout=300)
        return Run(process.returncode, out, err)

    def snapshot(self, repo: str) -> Path:
        """Where the library keeps what it downloaded of a repository."""
        return self.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


@contextmanager
def serving(repos: dict[str, dict[str, bytes]], home: Path) -> Iterator[Server]:
    """A running server; `home` becomes HF_HOME."""
    server = Server(repos, home)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.endpoint = f"http://127.0.0.1:{listener.server_port}"
    thread = Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def large(name: str) -> bool:
    """Whether a file is kept outside of git, behind a redirect."""
    return name.endswith(".safetensors")


def _entry(name: str, data: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    """The hub's endpoints: a paged tree, and files that are either small or behind a redirect with linked headers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/tree/")
                if self._known(repo, revision):
                    self._tree(repo, revision, parse_qs(url.query))
            elif path.startswith("/large/"):
                owner, name, file = path.removeprefix("/large/").split("/", 2)
                self._file(f"{owner}/{name}", file)
            else:
                repo, _, rest = path.removeprefix("/").partition("/resolve/")
                revision, _, file = rest.partition("/")
                if self._known(repo, revision):
                    self._resolve(repo, file)

        def _known(self, repo: str, revision: str) -> bool:
            if repo == "someone/gated":
                self._refuse(403, "GatedRepo")
            elif repo not in server.repos:
                # What the hub says of unknown and of private repositories to those who did not log in.
                self._refuse(401, "RepoNotFound")
            elif revision not in REVISIONS:
                self._refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def _tree(self, repo: str, revision: str, query: dict[str, list[str]]) -> None:
            server.pages[repo] += 1
            deep = query["recursive"][0].lower() == "true"
            files = {name: data for name, data in server.repos[repo].items() if deep or "/" not in name}
            start = int(query.get("cursor", ["0"])[0])
            folders = [{"type": "directory", "path": name, "oid": "0" * 40} for name in ("unet", "vae")]
            entries = [_entry(name, files[name]) for name in sorted(files)[start : start + PAGE]]
            more = {}
            if start + PAGE < len(files):
                query_string = f"recursive={deep}&expand=False&cursor={start + PAGE}"
                following = f"{server.endpoint}/api/models/{repo}/tree/{revision}?{query_string}"
                more = {"Link": f'<{following}>; rel="next"'}
            self._answer(200, json.dumps([*folders, *entries]).encode(), **more)

        def _resolve(self, repo: str, name: str) -> None:
            files = server.repos[repo]
            if name not in files:
                self._refuse(404, "EntryNotFound", **{"X-Repo-Commit": COMMIT})
            elif large(name):
                headers = {
                    "Location": f"{server.endpoint}/large/{repo}/{name}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(files[name])),
                    "X-Linked-ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
                }
                self._answer(302, b"", **headers)
            else:
                self._file(repo, name)

        def _file(self, repo: str, name: str) -> None:
            data = server.repos[repo][name]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            status = 206 if asked and server.ranges else 200
            if status == 206:
                start, _, last = asked.partition("-")
                headers["Content-Range"] = f"bytes {asked}/{len(data)}"
                data = data[int(start) : int(last) + 1]
            server.sent[repo][name] += len(data) if self.command == "GET" else 0
            self._answer(status, data, **headers)

        def _refuse(self, status: int, code: str, **headers: str) -> None:
            body = json.dumps({"error": "no"}).encode()
            self._answer(status, body, **{"X-Error-Code": code, "X-Error-Message": "no", **headers})

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                # Whoever asked may have what it wanted and be gone.
                with suppress(ConnectionError):
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
