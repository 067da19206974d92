"""tronie on an NVIDIA GPU against diffusers, in one go: correctness, seconds, device memory.

    python benches/gpu/compare.py --work FOLDER --ort-lib FOLDER [--steps 30 --size 1024 --runs 5 --cpu]

Makes SDXL base with full-size random weights, paints the same request with tronie (f16, several settings of the CUDA
provider) and with diffusers (f16 with SDPA, f16 with torch.compile, f32), and prints a table and a JSON file. See
README.md beside it for what it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "sdxl-base"
PROMPT, NEGATIVE = "an old sailor with a red cap, oil on panel", "blurred"

# What is tried of ONNX Runtime's CUDA provider: name -> TRONIE_CUDA_OPTIONS. Bits of `sdpa_kernel`: 1 flash,
# 2 memory-efficient, 8 cuDNN's flash, 16 plain.
TRONIE = {
    "tronie": "",
    "tronie, CUDA graph": "enable_cuda_graph=1",
    "tronie, ONNX Runtime's flash attention": "sdpa_kernel=19",
    "tronie, conv bias apart": "fuse_conv_bias=0",
    "tronie, one stream": "use_ep_level_unified_stream=1",
}
DIFFUSERS = {"diffusers f16, SDPA": "sdpa", "diffusers f16, torch.compile": "compile", "diffusers f32": "f32"}


@dataclass
class Row:
    """What one variant gave; `seconds` are whole runs after the first, `steps` their denoising steps."""

    name: str
    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    device_bytes: int | None = None
    latents: str | None = None
    psnr: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds of a whole run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def step(self) -> float | None:
        """Seconds of a denoising step."""
        return statistics.median(self.steps) if self.steps else None


class DeviceMemory:
    """The most device memory in use meanwhile, above what was in use before; wants the GPU for itself."""

    def __init__(self, index: int) -> None:
        self.command = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        self.peak = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def used(self) -> int:
        """Bytes in use on the device."""
        text = subprocess.run(self.command, capture_output=True, text=True, check=True).stdout
        return int(text.split()[0]) << 20

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, self.used())

    def __enter__(self) -> DeviceMemory:
        self.before = self.used()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak - self.before, 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights (7 GB), kept, and results")
    parser.add_argument(
        "--ort-lib",
        type=Path,
        default=os.environ.get("ORT_DYLIB_PATH"),
        help="folder of libonnxruntime.so.* and libonnxruntime_providers_cuda.so [default: $ORT_DYLIB_PATH]",
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=1024, help="height and width, px")
    parser.add_argument("--runs", type=int, default=5, help="measured runs; one more goes before")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", type=int, default=0, help="which GPU, for nvidia-smi")
    parser.add_argument("--cpu", action="store_true", help="reference from tronie on the CPU in f32 (up to an hour)")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--diffusers", choices=sorted(DIFFUSERS.values()), help=argparse.SUPPRESS)
    parser.add_argument("--latents", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Everything, or one diffusers variant in a process of its own."""
    args = arguments()
    args.work = args.work.resolve()
    if args.diffusers:
        return run_diffusers(args)
    if args.ort_lib is not None:
        # ORT_DYLIB_PATH may name the library itself; the provider lies beside it.
        args.ort_lib = Path(args.ort_lib).resolve()
        args.ort_lib = args.ort_lib.parent if args.ort_lib.is_file() else args.ort_lib
    if args.ort_lib is None or not (args.ort_lib / "libonnxruntime_providers_cuda.so").is_file():
        print(f"--ort-lib {args.ort_lib}: no libonnxruntime_providers_cuda.so there; see benches/gpu/README.md")
        return 2
    args.work.mkdir(parents=True, exist_ok=True)
    weights = args.work / CONFIG
    catalogue = args.work / "models.yaml"
    if not catalogue.exists():
        command = ["random", "--config", CONFIG, "--dtype", "f16", "--out", weights, "--catalogue", catalogue]
        call([sys.executable, "-m", "export", *command])
    call(["cargo", "build", "--release", "--locked", "--example", "repeat"])
    rows = [measure(args, name) for name in (*TRONIE, *DIFFUSERS) if not args.only or args.only in name]
    reference = cpu_reference(args) if args.cpu else next((r for r in rows if r.name == "diffusers f32"), None)
    compare(rows, reference)
    report(args, rows, reference)
    return 1 if any(row.failure for row in rows) else 0


def call(command: list[object]) -> None:
    """Runs a command of this repository; its failure ends everything."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def environment(args: argparse.Namespace, options: str) -> dict[str, str]:
    """What tronie finds ONNX Runtime and CUDA's libraries by: those of the Python environment, if it has them."""
    folders = [str(path) for root in sys.path for path in Path(root).glob("nvidia/*/lib") if path.is_dir()]
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "ORT_DYLIB_PATH": str(args.ort_lib),
        "LD_LIBRARY_PATH": ":".join([*folders, *([before] if before else [])]),
        "TRONIE_CUDA_OPTIONS": options,
    }


def measure(args: argparse.Namespace, name: str) -> Row:
    """One variant in a process of its own, under the eye of nvidia-smi."""
    latents = args.work / f"{name.replace(' ', '-').replace(',', '').replace(chr(39), '')}.safetensors"
    if name in TRONIE:
        command = tronie(args, "cuda", args.runs + 1, latents)
        env = environment(args, TRONIE[name])
    else:
        given = ["--work", args.work, "--steps", args.steps, "--size", args.size, "--runs", args.runs]
        given += ["--guidance", args.guidance, "--seed", args.seed]
        command = [
            sys.executable,
            Path(__file__).resolve(),
            *given,
            "--diffusers",
            DIFFUSERS[name],
            "--latents",
            latents,
        ]
        env = dict(os.environ)
    print(f"{name} …", flush=True)
    latents.unlink(missing_ok=True)
    with DeviceMemory(args.device) as memory:
        done = subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True)
    row = Row(name, device_bytes=memory.peak)
    if done.returncode != 0:
        row.failure = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        print(done.stderr, file=sys.stderr)
        return row
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    row.first, row.latents = runs[0]["total"], str(latents)
    row.seconds = [run["total"] for run in runs[1:]]
    # The first step of a run waits for what was loaded before it.
    row.steps = [step for run in runs[1:] for step in run["steps"][1:]]
    return row


def tronie(args: argparse.Namespace, provider: str, runs: int, latents: Path) -> list[object]:
    """The command that paints the request `runs` times."""
    request = {
        "prompt": PROMPT,
        "negative": NEGATIVE,
        "model": CONFIG,
        "models": str(args.work / "models.yaml"),
        "provider": provider,
        "width": args.size,
        "height": args.size,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "scheduler": "euler",
    }
    path = args.work / f"request-{provider}.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    return [ROOT / "target" / "release" / "examples" / "repeat", path, runs, latents]


def cpu_reference(args: argparse.Namespace) -> Row:
    """tronie on the CPU, f32, once."""
    latents = args.work / "tronie-cpu.safetensors"
    print("tronie on the CPU …", flush=True)
    started = time.monotonic()
    command = [str(part) for part in tronie(args, "cpu", 1, latents)]
    subprocess.run(command, cwd=ROOT, env=environment(args, ""), check=True, capture_output=True)
    return Row("tronie f32, CPU", first=time.monotonic() - started, latents=str(latents))


def run_diffusers(args: argparse.Namespace) -> int:
    """One variant of diffusers; prints a JSON line a run, as the example `repeat` does."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    dtype = torch.float32 if args.diffusers == "f32" else torch.float16
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        args.work / CONFIG, variant="fp16", torch_dtype=dtype, add_watermarker=False
    ).to("cuda")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if args.diffusers != "f32":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if args.diffusers == "compile":
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
    final = {}
    for run in range(args.runs + 1):
        steps: list[float] = []
        torch.cuda.synchronize()
        started = last = time.perf_counter()
        pipe(PROMPT, **_request(args, torch), callback_on_step_end=_stopwatch(torch, steps, last, final))
        torch.cuda.synchronize()
        print(json.dumps({"run": run, "steps": steps, "total": time.perf_counter() - started}), flush=True)
    save_file({"latents": final["latents"].float().cpu().contiguous()}, args.latents)
    return 0


def _request(args: argparse.Namespace, torch: object) -> dict:
    return {
        "negative_prompt": NEGATIVE,
        "width": args.size,
        "height": args.size,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "generator": torch.Generator("cpu").manual_seed(args.seed),
    }


def _stopwatch(torch: object, steps: list[float], last: float, final: dict) -> Callable:
    def step(_pipe: object, _index: int, _timestep: object, values: dict) -> dict:
        nonlocal last
        torch.cuda.synchronize()
        now = time.perf_counter()
        steps.append(now - last)
        last = now
        final["latents"] = values["latents"].clone()
        return values

    return step


def compare(rows: list[Row], reference: Row | None) -> None:
    """PSNR of everyone's final latents against the reference's, dB over the reference's range."""
    from safetensors.numpy import load_file

    if reference is None or reference.latents is None:
        return
    expected = load_file(reference.latents)["latents"].astype("float64")
    span = float(expected.max() - expected.min())
    for row in rows:
        if row.latents is None or row is reference:
            continue
        found = load_file(row.latents)["latents"].astype("float64")
        error = float(((found - expected) ** 2).mean())
        row.psnr = math.inf if error == 0 else 10 * math.log10(span**2 / error)


def report(args: argparse.Namespace, rows: list[Row], reference: Row | None) -> None:
    """The table, and the same with everything in it as JSON."""
    print(f"\n{args.size}², {args.steps} steps, guidance {args.guidance}, median of {args.runs} runs")
    print(f"PSNR of latents against {reference.name if reference else 'nothing'}\n")
    print("| variant | s/picture | ms/step | first run, s | device GiB | PSNR, dB |\n|---|---|---|---|---|---|")
    for row in rows:
        if row.failure:
            print(f"| {row.name} | failed: {row.failure} | | | | |")
            continue
        cells = (
            _cell(row.median, "{:.3f}"),
            _cell(row.step and row.step * 1e3, "{:.1f}"),
            _cell(row.first, "{:.1f}"),
            _cell(row.device_bytes and row.device_bytes / 2**30, "{:.2f}"),
            _cell(row.psnr, "{:.1f}"),
        )
        print(f"| {row.name} | {' | '.join(cells)} |")
    machine = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    result = {
        "machine": machine,
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "reference": asdict(reference) if reference else None,
        "rows": [asdict(row) for row in rows],
    }
    handle, temporary = tempfile.mkstemp(dir=args.work, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(result, stream, indent=1)
    path = args.work / "gpu.json"
    Path(temporary).replace(path)
    print(f"\n{path}")


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
