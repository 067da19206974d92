"""A memory cgroup for one process, and a cold page cache."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from checkpoint import RefusedError

CGROUPS = Path("/sys/fs/cgroup")
DROP = Path("/proc/sys/vm/drop_caches")


class Cgroup:
    """A memory cgroup of its own for one process, v1 or v2; taken away at the end."""

    def __init__(self, limit: str) -> None:
        parent, self.version = self.controller()
        # Its own: one of another run that is still there is not touched.
        self.folder = parent / f"tronie-full-size-{os.getpid()}"
        self.limit = limit
        # How long a process may stay in it.
        self.seconds: float | None = None

    @staticmethod
    def controller() -> tuple[Path, int]:
        """Where memory cgroups are made, and which version they are."""
        if os.geteuid() != 0:
            raise RefusedError("--cgroup: needs root, to make a memory cgroup and to empty the page cache")
        controllers = CGROUPS / "cgroup.controllers"
        if (CGROUPS / "memory").is_dir():
            parent, version = CGROUPS / "memory", 1
        elif controllers.is_file() and "memory" in controllers.read_text().split():
            parent, version = CGROUPS, 2
        else:
            raise RefusedError(f"--cgroup: no memory controller under {CGROUPS}")
        if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
            raise RefusedError(f"--cgroup: {parent} is read-only here")
        if not os.access(DROP, os.W_OK):
            raise RefusedError(f"--cgroup: {DROP} cannot be written, so the page cache stays warm")
        return parent, version

    def __enter__(self) -> Cgroup:
        try:
            if self.version == 2:
                (CGROUPS / "cgroup.subtree_control").write_text("+memory")
            self.folder.mkdir()
            self.set("memory.limit_in_bytes" if self.version == 1 else "memory.max", self.limit)
            # Where swap is accounted for, none is allowed.
            with contextlib.suppress(OSError):
                self.set("memory.memsw.limit_in_bytes" if self.version == 1 else "memory.swap.max", self.swap())
        except OSError as error:
            self.__exit__()
            raise RefusedError(f"--cgroup {self.limit}: {error}") from error
        return self

    def swap(self) -> str:
        """The limit of swap: v1 counts memory in it."""
        return self.limit if self.version == 1 else "0"

    def set(self, name: str, value: str) -> None:
        """Writes a setting."""
        (self.folder / name).write_text(value)

    def peak(self) -> int | None:
        """The most memory it held, page cache included, bytes; older kernels do not tell in v2."""
        path = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(path.read_text()) if path.exists() else None

    def enter(self) -> None:
        """Moves the calling process into it."""
        self.set("cgroup.procs", str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        # Its pages go with its last process, which may take the kernel a moment.
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)


def forget() -> None:
    """Drops the page cache of the whole machine, so that what is read is the cgroup's."""
    os.sync()
    try:
        DROP.write_text("3")
    except OSError as error:
        raise RefusedError(f"--cgroup: the page cache cannot be dropped: {error}") from error
