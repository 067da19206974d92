"""tronie against torch on one checkpoint, on the CPU, in one run: seconds, memory, equality of the numbers.

    python -m export random --config sdxl-base --dtype f32 --out big/sdxl-base --catalogue big/models.yaml
    python benches/full_size.py --models big/models.yaml [--model sdxl-base] [--json result.json]

torch runs diffusers' own UNet2DConditionModel and AutoencoderKL, its weights mapped and not copied, in f32 on as many
threads as tronie. Processes take turns, torch, tronie in each of --modes, torch again, --rounds times, so that never
two are in memory at once. torch warms each network up with one run and then times --forwards. tronie is `bench` with
--forwards + 1 steps, --runs times: the first step of each run warms the UNet up, the first run the decoder, whose time
counts only where there is no other. Batch 1, guidance 1, inputs random with a seed. Printed are the median, least and
largest of all rounds together, the ratio of the medians to torch's, and the ratio of each round, least to largest:
where these lie apart the machine drifted. The share of a step outside ONNX Runtime is the median of the rounds.
Then, each once:

- work, rate and share of the limit, from `tronie bench` with its profiler (--no-work leaves it out);
- the load of the UNet (seconds, and anonymous memory that it adds at its highest) and the anonymous memory while
  denoising, in `low`, at --size, and with one step at --large (0 leaves it out);
- the largest difference of the final latents of a run of one step to those of StableDiffusionXLPipeline, with the same
  seed and text, relative to the largest of those (--no-equality leaves it out);
- with --cgroup 4G: a request with --refiner at --large, two steps and one, in `low`, with a cold page cache, in a
  memory cgroup of that size, whose seconds, peak and exit status are told. Needs root and a memory controller (cgroup
  v1 or v2) that may be written; the page cache of the whole machine is dropped. Too small a cgroup need not kill: it
  may read the same pages for ever, so --cgroup-minutes ends it. --only-cgroup runs nothing else.

Two tables in Markdown come out, of seconds and of the project's bars (bars.py), which are meant for SDXL base at
512x512 and 1024x1024 px and mean nothing for other models. The exit status is 0 whether they hold or not; 2 for what
cannot be measured. --json FILE has all of it: the arguments, speed, bench (the profiled runs), low, bars,
latents-largest-relative-difference, cgroup.

A step of tronie is all of it, the scheduler's part too, but not the keys and values of the text, which tronie computes
once a request and torch in every forward; the ratio of the UNet holds that difference.

At full size everything together should take 30 to 40 minutes on two cores (estimated), and wants 24 GB of memory for
the mode `fast`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bars
from bars import Samples
from cgroup import Cgroup, forget
from checkpoint import PROMPT, SEED, Checkpoint, RefusedError

ROOT = Path(__file__).resolve().parents[1]
MODES = ("fast", "balanced", "low")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="catalogue, a models.yaml")
    parser.add_argument("--model", default="sdxl-base", help="base model (default sdxl-base)")
    parser.add_argument("--checkpoint", type=Path, help="its folder, for torch (default: where the catalogue has it)")
    parser.add_argument("--refiner", default="sdxl-refiner", help="refiner, for --cgroup (default sdxl-refiner)")
    parser.add_argument("--tronie", type=Path, default=ROOT / "target/release/tronie", help="the executable")
    parser.add_argument("--ort-lib", type=Path, help="ONNX Runtime's library or folder (default: as tronie finds it)")
    parser.add_argument("--modes", default="fast,low", help="memory modes of tronie (default fast,low)")
    parser.add_argument("--size", type=int, default=512, help="height and width, px (default 512)")
    parser.add_argument("--large", type=int, default=1024, help="the larger size, px; 0 leaves it out (default 1024)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="how often processes alternate (default 3)")
    parser.add_argument("--forwards", type=int, default=3, help="timed runs of a network in a process (default 3)")
    parser.add_argument("--runs", type=int, default=2, help="runs of tronie in a process (default 2)")
    parser.add_argument("--no-work", action="store_true", help="leave out the profiled runs")
    parser.add_argument("--no-equality", action="store_true", help="leave out the comparison of latents")
    parser.add_argument("--cgroup", metavar="SIZE", help="also a request in a memory cgroup of this size, e.g. 4G")
    parser.add_argument("--cgroup-minutes", type=float, default=30, help="when it is ended (default 30)")
    parser.add_argument("--only-cgroup", action="store_true", help="nothing but what --cgroup asks for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--torch", choices=["networks", "latents"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cgroup_minutes <= 0:
        parser.error("--cgroup-minutes must be above 0")
    if min(args.rounds, args.forwards, args.runs, args.threads) < 1:
        parser.error("--rounds, --forwards, --runs and --threads must be at least 1")
    if args.size < 8 or args.large < 0 or args.size % 8 or args.large % 8:
        parser.error("--size and --large are multiples of 8 px; --large may be 0")
    if args.only_cgroup and not args.cgroup:
        parser.error("--only-cgroup wants --cgroup SIZE, e.g. --cgroup 4G")
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        parser.error(f"--modes {args.modes}: modes are {', '.join(MODES)}")
    return args


def main() -> int:
    """Everything, or torch's part in a process of its own."""
    args = arguments()
    try:
        if args.torch:
            import torch_side

            return torch_side.run(args, Checkpoint.find(args.models, args.model, args.checkpoint))
        return compare(args)
    except RefusedError as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    """Runs all parts, prints as it goes, and writes the JSON file."""
    checkpoint = Checkpoint.find(args.models, args.model, args.checkpoint)
    if not args.tronie.is_file():
        raise RefusedError(f"--tronie {args.tronie}: no such file; `cargo build --release` makes it")
    # Found out before the long part, not after it.
    if args.json and not args.json.resolve().parent.is_dir():
        raise RefusedError(f"--json {args.json}: its folder does not exist; make it")
    if args.cgroup:
        Checkpoint.find(args.models, args.refiner)
        Cgroup.controller()
    if not args.only_cgroup and not args.no_equality:
        checkpoint.root()
    result: dict[str, object] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("torch", "out", "json")
    }
    if not args.only_cgroup:
        measure(args, result)
    if args.cgroup:
        result["cgroup"] = confined(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(args: argparse.Namespace, result: dict[str, object]) -> None:
    """Everything but the cgroup: into `result`, and printed."""
    result["speed"] = times = speed(args)
    print(f"\n{args.model}, {args.size}×{args.size} px, batch 1, guidance 1, {args.threads} threads, f32\n")
    print(bars.speed_table(times), flush=True)
    if not args.no_work:
        result["bench"] = work(args)
    result["low"] = rows = low(args)
    found = bars.of(times, rows)
    result["bars"] = [bar.json() for bar in found]
    print(f"\n{bars.bar_table(found)}\n\n{bars.verdict(found)}", flush=True)
    if not args.no_equality:
        result["latents-largest-relative-difference"] = difference = equality(args)
        print(f"final latents of one step: largest difference {difference:.1e} of the largest value", flush=True)


def speed(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of both networks in torch and in every mode of tronie, with the share outside ONNX Runtime."""
    modes = args.modes.split(",")
    times = {name: {"unet": Samples(), "vae": Samples()} for name in ("torch", *modes)}
    outside: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}: torch")
        add(times["torch"], torch(args, "networks"))
        for mode in modes:
            say(f"round {number + 1} of {args.rounds}: tronie, {mode}")
            rest = ["--steps", args.forwards + 1, "--runs", args.runs, "--times-only"]
            row = bench(args, mode, args.size, *rest)
            decoder = row["decoder"]["samples"]
            add(times[mode], {"unet": row["unets"][0]["samples"], "vae": decoder[1:] or decoder})
            outside[mode].append(row["unets"][0]["outside-runtime-share"])
    return {
        name: {network: samples.summary(times["torch"][network]) for network, samples in networks.items()}
        | ({"outside-runtime-share": statistics.median(outside[name])} if name in outside else {})
        for name, networks in times.items()
    }


def work(args: argparse.Namespace) -> dict[str, dict]:
    """tronie's own report of work, rate and operators, by mode."""
    reports = {}
    print()
    for mode in args.modes.split(","):
        say(f"work: tronie, {mode}")
        reports[mode] = row = bench(args, mode, args.size, "--steps", 3)
        for what, part in (("UNet", row["unets"][0]), ("VAE", row["decoder"])):
            if part["flops"] is None:
                print(f"tronie, {mode}: the work of the {what} is not told by its operators' shapes")
                continue
            limit = row["limit-flops-per-second"] / 1e9
            rates = f"{part['flops-per-second'] / 1e9:.1f} GFLOP/s, {part['share-of-limit']:.1%} of {limit:.1f}"
            print(f"tronie, {mode}: {what} {part['flops'] / 1e12:.3g} TFLOP, {rates}")
    return reports


def low(args: argparse.Namespace) -> list[dict]:
    """Loads and memory in the mode `low`, by size."""
    results = []
    for size in dict.fromkeys((args.size, args.large)):
        if not size:
            continue
        say(f"memory: tronie, low, {size}x{size}")
        row = bench(args, "low", size, "--steps", 1, "--times-only")
        load = next(s for s in row["stages"] if s["stage"] == "load" and s["what"] == f"unet of {args.model}")
        if load["anonymous-bytes-peak"] is None:
            raise RefusedError("this system does not tell a process's anonymous memory; Linux does")
        results.append(
            {
                "size": size,
                "unet-load-seconds": load["seconds"],
                "unet-load-anonymous-bytes": load["anonymous-bytes-peak"] - load["anonymous-bytes-before"],
                "denoise-anonymous-bytes": row["denoise-anonymous-bytes"],
                "peak-anonymous-bytes": row["peak-anonymous-bytes"],
                "measured": row,
            }
        )
    return results


def equality(args: argparse.Namespace) -> float:
    """The largest difference of final latents after one step, relative to the largest of diffusers'."""
    import numpy as np
    from safetensors.numpy import load_file

    say("equality: one step in both")
    with tempfile.TemporaryDirectory() as folder:
        own, other = Path(folder) / "own.safetensors", Path(folder) / "other.safetensors"
        # `stop-at` the only step leaves out the decoder.
        rest = ["--steps", 1, "--scheduler", "euler", "--memory", "low", "--stop-at", 1, "--latents-out", own]
        checked(generate(args, args.size, *rest))
        torch(args, "latents", "--out", other)
        ours, theirs = load_file(own)["latents"], load_file(other)["latents"]
    if ours.shape != theirs.shape:
        raise RefusedError(f"tronie's latents are {list(ours.shape)}, diffusers' {list(theirs.shape)}")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def confined(args: argparse.Namespace) -> dict:
    """Base, refiner and decoder in a memory cgroup, with nothing of their files in the page cache."""
    size = args.large or args.size
    say(f"cgroup: base, refiner and VAE at {size}x{size} in {args.cgroup}")
    with Cgroup(args.cgroup) as group, tempfile.TemporaryDirectory() as folder:
        forget()
        pair = ["--refiner", args.refiner, "--refine-at", 0.7, "--steps", 3]
        started = time.perf_counter()
        rest = ["--memory", "low", "--output", Path(folder) / "picture.png", "--json"]
        group.seconds = args.cgroup_minutes * 60
        run = generate(args, size, *pair, *rest, group=group)
        seconds, peak = time.perf_counter() - started, group.peak()
        painted = (Path(folder) / "picture.png").is_file()
    told = "peak not told" if peak is None else f"{peak / 1e9:.2f} GB at most, page cache included"
    status = f"exit status {run.returncode}"
    if run.returncode < 0:
        # The kernel, for its memory, or this script, for its time.
        late = seconds >= args.cgroup_minutes * 60
        status = f"killed by signal {-run.returncode}" + (" after --cgroup-minutes" if late else "")
    print(
        f"\nin a cgroup of {args.cgroup}, {size}×{size} px, base 2 steps, refiner 1: {seconds:.0f} s, {told}, {status}"
    )
    if run.returncode:
        print(last_lines(run))
    report = json.loads(run.stdout) if run.returncode == 0 else None
    outcome = {"seconds": seconds, "peak-bytes": peak, "exit-status": run.returncode, "painted": painted}
    return {"limit": args.cgroup, "size": size, **outcome, "report": report}


def torch(args: argparse.Namespace, what: str, *rest: object) -> dict:
    """Runs torch's part in a process of its own."""
    names = ("models", "model", "size", "threads", "forwards")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    if args.checkpoint:
        flags.append(f"--checkpoint={args.checkpoint}")
    script = [sys.executable, "-W", "ignore", __file__, f"--torch={what}", *flags, *map(str, rest)]
    return json.loads(checked(call(script)).splitlines()[-1])


def bench(args: argparse.Namespace, mode: str, size: int, *rest: object) -> dict:
    """What `tronie bench` measured of one mode."""
    words = ["--memory", mode, "--size", f"{size}x{size}", "--guidance", 1, "--json"]
    run = tronie(args, "bench", *words, *rest)
    # Its status says no more than the row's own reason.
    row = json.loads(run.stdout)["rows"][0] if run.stdout.strip() else {"measured": None, "reason": last_lines(run)}
    if row["measured"] is None:
        raise RefusedError(f"`tronie bench --memory {mode} --size {size}x{size}`: {row['reason']}")
    return row["measured"]


def generate(
    args: argparse.Namespace, size: int, *rest: object, group: Cgroup | None = None
) -> subprocess.CompletedProcess[str]:
    """One request without guidance."""
    words = [PROMPT, "--width", size, "--height", size, "--guidance", 1, "--seed", SEED]
    return tronie(args, "generate", *words, *rest, group=group)


def tronie(
    args: argparse.Namespace, command: str, *rest: object, group: Cgroup | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the executable."""
    common = ["--models", args.models, "--model", args.model, "--threads", args.threads]
    library = ["--ort-lib", args.ort_lib] if args.ort_lib else []
    return call([str(word) for word in (args.tronie.resolve(), command, *rest, *common, *library)], group)


def call(words: list[str], group: Cgroup | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command, in a cgroup where one is given."""
    if not group:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=group.enter) as process:
        try:
            out, err = process.communicate(timeout=group.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        except BaseException:
            # The cgroup can only be removed when nothing is left in it.
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def checked(run: subprocess.CompletedProcess[str]) -> str:
    """What a command printed; its failure ends the comparison."""
    if run.returncode:
        raise RefusedError(f"`{' '.join(run.args)}` ended with {run.returncode}:\n{last_lines(run)}")
    return run.stdout


def last_lines(run: subprocess.CompletedProcess[str]) -> str:
    """The end of what a command said."""
    return "\n".join(run.stderr.strip().splitlines()[-5:] + run.stdout.strip().splitlines()[-5:])


def add(times: dict[str, Samples], samples: dict[str, list[float]]) -> None:
    """Adds a round."""
    for network, seconds in samples.items():
        times[network].rounds.append(seconds)


def say(text: str) -> None:
    """What happens meanwhile."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
