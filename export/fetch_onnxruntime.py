"""Takes ONNX Runtime's shared library out of its wheel: `fetch_onnxruntime.py VERSION FOLDER`.

Needs nothing but pip; the rest of the wheel is not installed.
"""

import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PATTERNS = ("onnxruntime/capi/libonnxruntime*.so*", "onnxruntime/capi/libonnxruntime*.dylib", "onnxruntime/capi/*.dll")


def fetch(version: str, folder: Path) -> list[Path]:
    """Puts the libraries of one version into a folder and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", downloads]
        subprocess.run([*pip, f"onnxruntime=={version}"], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if any(fnmatch.fnmatch(n, pattern) for pattern in PATTERNS)]
            for name in names:
                (folder / Path(name).name).write_bytes(archive.read(name))
    if not names:
        raise SystemExit(f"the wheel of onnxruntime {version} has no library")
    return [folder / Path(name).name for name in names]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    for path in fetch(sys.argv[1], Path(sys.argv[2])):
        print(path)
