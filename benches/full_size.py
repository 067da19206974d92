"""tronie against torch on one checkpoint, on the CPU, in one run: seconds, memory, equality of the numbers.

    python -m export random --config sdxl-base --dtype f32 --out big/sdxl-base --catalogue big/models.yaml
    python benches/full_size.py --models big/models.yaml [--model sdxl-base] [--json result.json]

torch runs diffusers' own UNet2DConditionModel and AutoencoderKL, its weights mapped and not copied, on as many threads
as tronie. Processes alternate, torch, tronie in each of --modes, torch again, --rounds times; each warms up with one
run of a network and then times --forwards more. Batch 1, guidance 1, inputs random with a seed. Printed are medians of
all, ratios of medians to torch's, and in brackets the least and the largest ratio of a round. Then, each once:

- work, rate and share of the limit, from `tronie bench`;
- the load of the UNet and the anonymous memory while denoising, `low`, at --size and at --large (0 leaves it out);
- the largest difference of the final latents of a run of one step to those of diffusers' pipeline, with the same seed,
  relative to the largest of those;
- with --cgroup 4G: a request with --refiner at --large, two steps and one, in `low`, with a cold page cache, in a
  memory cgroup of that size. Needs root and a memory controller (cgroup v1 or v2) that may be written.

At full size everything together takes some 40 minutes on two cores and wants 24 GB of memory for the mode `fast`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cgroup import Cgroup, forget
from checkpoint import PROMPT, SEED, Checkpoint, RefusedError

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Samples:
    """Seconds of one network in one variant, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    def median(self) -> float:
        """Of all rounds together."""
        return statistics.median(second for seconds in self.rounds for second in seconds)

    def ratio(self, base: Samples) -> tuple[float, float, float]:
        """Ratio of the medians to `base`'s, and the least and the largest of a round."""
        pairs = zip(self.rounds, base.rounds, strict=True)
        ratios = [statistics.median(own) / statistics.median(other) for own, other in pairs]
        return self.median() / base.median(), min(ratios), max(ratios)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="catalogue, a models.yaml")
    parser.add_argument("--model", default="sdxl-base", help="base model (default sdxl-base)")
    parser.add_argument("--refiner", default="sdxl-refiner", help="refiner, for --cgroup (default sdxl-refiner)")
    parser.add_argument("--tronie", type=Path, default=ROOT / "target/release/tronie", help="the executable")
    parser.add_argument("--ort-lib", type=Path, help="ONNX Runtime's library or folder (default: as tronie finds it)")
    parser.add_argument("--modes", default="fast,low", help="memory modes of tronie (default fast,low)")
    parser.add_argument("--size", type=int, default=512, help="height and width, px (default 512)")
    parser.add_argument("--large", type=int, default=1024, help="the larger size, px; 0 leaves it out (default 1024)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="how often processes alternate (default 3)")
    parser.add_argument("--forwards", type=int, default=3, help="timed runs of a network in a process (default 3)")
    parser.add_argument("--no-equality", action="store_true", help="leave out the comparison of latents")
    parser.add_argument("--cgroup", metavar="SIZE", help="also a request in a memory cgroup of this size, e.g. 4G")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--torch", choices=["networks", "latents"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rounds, args.forwards, args.threads, args.size) < 1 or args.large < 0:
        parser.error("--rounds, --forwards, --threads and --size must be at least 1, --large at least 0")
    return args


def main() -> int:
    """Everything, or torch's part in a process of its own."""
    args = arguments()
    try:
        if args.torch:
            import torch_side

            return torch_side.run(args, Checkpoint.find(args.models, args.model))
        return compare(args)
    except RefusedError as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    """Runs all parts, prints as it goes, and writes the JSON file."""
    checkpoint = Checkpoint.find(args.models, args.model)
    if not args.tronie.is_file():
        raise RefusedError(f"--tronie {args.tronie}: no such file; `cargo build --release` makes it")
    if args.cgroup:
        # Found out before the long part, not after it.
        Checkpoint.find(args.models, args.refiner)
        Cgroup.controller()
    result: dict[str, object] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("torch", "out", "json")
    }
    result["speed"], result["bench"] = speed(args)
    result["low"] = low(args)
    if not args.no_equality:
        result["latents-largest-relative-difference"] = difference = equality(args, checkpoint)
        print(f"final latents of one step: largest difference {difference:.1e} of the largest value")
    if args.cgroup:
        result["cgroup"] = confined(args, checkpoint)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def speed(args: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds of both networks in torch and in every mode of tronie; and tronie's own report of work, by mode."""
    modes = args.modes.split(",")
    times = {name: {"unet": Samples(), "vae": Samples()} for name in ("torch", *modes)}
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}: torch")
        add(times["torch"], torch(args, "networks"))
        for mode in modes:
            say(f"round {number + 1} of {args.rounds}: tronie, {mode}")
            # One run more than are timed: the first warms the decoder up, the first step of each the UNet.
            runs = args.forwards + 1
            row = bench(args, mode, args.size, "--steps", 2, "--runs", runs, "--times-only")
            samples = {"unet": row["unets"][0]["samples"][1:], "vae": row["decoder"]["samples"][1:]}
            add(times[mode], samples)
    print(f"\n{args.model}, {args.size}x{args.size} px, batch 1, guidance 1, {args.threads} threads, f32")
    print(f"{'':24}{'UNet forward':>32}{'VAE decode':>32}")
    speed = {}
    for name, networks in times.items():
        cells, speed[name] = "", {}
        for network, samples in networks.items():
            ratio, least, largest = samples.ratio(times["torch"][network])
            text = f"{samples.median():.3f} s"
            cells += f"{text if name == 'torch' else f'{text}  {ratio:.3f} ({least:.3f}-{largest:.3f})':>32}"
            speed[name][network] = {
                "seconds": samples.median(),
                "samples": samples.rounds,
                "ratio-to-torch": ratio,
                "ratio-least": least,
                "ratio-largest": largest,
            }
        print(f"{name if name == 'torch' else f'tronie, {name}':24}{cells}")
    reports = {}
    for mode in modes:
        say(f"work: tronie, {mode}")
        reports[mode] = row = bench(args, mode, args.size, "--steps", 3)
        for what, part in (("UNet", row["unets"][0]), ("VAE", row["decoder"])):
            work, rate, share = (part[key] for key in ("flops", "flops-per-second", "share-of-limit"))
            limit = row["limit-flops-per-second"] / 1e9
            rates = f"{rate / 1e9:.1f} GFLOP/s, {share:.1%} of the limit of {limit:.1f}"
            print(f"tronie, {mode}: {what} {work / 1e12:.3g} TFLOP, {rates}")
        print(f"tronie, {mode}: {row['unets'][0]['outside-runtime-share']:.3%} of a step outside ONNX Runtime")
    return speed, reports


def low(args: argparse.Namespace) -> list[dict]:
    """Loads and memory in the mode `low`, by size."""
    results = []
    for size in (args.size, args.large):
        if not size:
            continue
        say(f"memory: tronie, low, {size}x{size}")
        row = bench(args, "low", size, "--steps", 2, "--times-only")
        load = next(s for s in row["stages"] if s["stage"] == "load" and s["what"].startswith("unet of "))
        if load["anonymous-bytes-peak"] is None:
            raise RefusedError("this system does not tell a process's anonymous memory; Linux does")
        added = load["anonymous-bytes-peak"] - load["anonymous-bytes-before"]
        anonymous, peak = row["denoise-anonymous-bytes"], row["peak-anonymous-bytes"]
        print(
            f"tronie, low, {size}x{size}: UNet loads in {load['seconds']:.2f} s with {added / 1e9:.2f} GB anonymous; "
            f"{anonymous / 1e9:.2f} GB anonymous while denoising, {peak / 1e9:.2f} GB at most"
        )
        results.append(
            {
                "size": size,
                "unet-load-seconds": load["seconds"],
                "unet-load-anonymous-bytes": added,
                "denoise-anonymous-bytes": anonymous,
                "peak-anonymous-bytes": peak,
                "measured": row,
            }
        )
    return results


def equality(args: argparse.Namespace, checkpoint: Checkpoint) -> float:
    """The largest difference of final latents after one step, relative to the largest of diffusers'."""
    import numpy as np
    from safetensors.numpy import load_file

    checkpoint.root()
    say("equality: one step in both")
    with tempfile.TemporaryDirectory() as folder:
        own, other = Path(folder) / "own.safetensors", Path(folder) / "other.safetensors"
        # `stop-at` the only step leaves out the decoder.
        generate(args, args.size, "--steps", 1, "--memory", "low", "--stop-at", 1, "--latents-out", own)
        torch(args, "latents", "--out", other)
        ours, theirs = load_file(own)["latents"], load_file(other)["latents"]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def confined(args: argparse.Namespace, checkpoint: Checkpoint) -> dict:
    """Base, refiner and decoder in a memory cgroup, with nothing of their files in the page cache."""
    refiner = Checkpoint.find(args.models, args.refiner)
    size = args.large or args.size
    say(f"cgroup: base, refiner and VAE at {size}x{size} in {args.cgroup}")
    with Cgroup(args.cgroup) as group, tempfile.TemporaryDirectory() as folder:
        if reason := forget(checkpoint.every_file() + refiner.every_file()):
            say(reason)
        pair = ["--refiner", args.refiner, "--refine-at", 2 / 3, "--steps", 3]
        rest = ["--memory", "low", "--output", Path(folder) / "picture.png", "--json"]
        run = generate(args, size, *pair, *rest, group=group)
        peak = group.peak()
    print(
        f"in a cgroup of {args.cgroup}: {run['total-seconds']:.0f} s, "
        f"{'peak not told' if peak is None else f'{peak / 1e9:.2f} GB at most, page cache included'}"
    )
    return {"limit": args.cgroup, "size": size, "peak-bytes": peak, **run}


def torch(args: argparse.Namespace, what: str, *rest: object) -> dict:
    """Runs torch's part in a process of its own."""
    names = ("models", "model", "size", "threads", "forwards")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    script = [sys.executable, "-W", "ignore", __file__, f"--torch={what}", *flags, *map(str, rest)]
    return json.loads(call(script).splitlines()[-1])


def bench(args: argparse.Namespace, mode: str, size: int, *rest: object) -> dict:
    """What `tronie bench` measured of one mode."""
    words = ["--memory", mode, "--size", f"{size}x{size}", "--guidance", 1, "--json"]
    return json.loads(tronie(args, "bench", *words, *rest))["rows"][0]["measured"]


def generate(args: argparse.Namespace, size: int, *rest: object, group: Cgroup | None = None) -> dict:
    """One request without guidance; what it prints as JSON, where it is asked for."""
    words = [PROMPT, "--width", size, "--height", size, "--guidance", 1, "--seed", SEED]
    text = tronie(args, "generate", *words, *rest, group=group)
    return json.loads(text) if text else {}


def tronie(args: argparse.Namespace, command: str, *rest: object, group: Cgroup | None = None) -> str:
    """The executable's output."""
    common = ["--models", args.models, "--model", args.model, "--threads", args.threads]
    library = ["--ort-lib", args.ort_lib] if args.ort_lib else []
    words = [str(word) for word in (args.tronie, command, *rest, *common, *library)]
    return call(words, group)


def call(words: list[str], group: Cgroup | None = None) -> str:
    """Runs a command; its output. Its errors end the comparison."""
    run = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=group.enter if group else None)
    if run.returncode:
        lines = run.stderr.strip().splitlines()[-5:] + run.stdout.strip().splitlines()[-5:]
        raise RefusedError(f"`{' '.join(words)}` ended with {run.returncode}:\n" + "\n".join(lines))
    return run.stdout


def add(times: dict[str, Samples], samples: dict[str, list[float]]) -> None:
    """Adds a round."""
    for network, seconds in samples.items():
        times[network].rounds.append(seconds)


def say(text: str) -> None:
    """What happens meanwhile."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
