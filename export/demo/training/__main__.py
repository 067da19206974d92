"""`python -m export.demo.training FOLDER [--until STAGE]`: trains the demo model; run it again and it goes on.

It uses a GPU where torch finds one. On a CPU, one process for each core is faster:
`torchrun --nproc-per-node 2 -m export.demo.training FOLDER --threads 1`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from export.demo.training import workers
from export.demo.training.stages import Training


def main() -> None:
    """Runs the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where pictures and the states of training are kept; 4 GB")
    parser.add_argument("--until", choices=Training.STAGES, default=Training.STAGES[-1], help="last stage to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    torch.set_default_device(given.device)
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    workers.join()
    given.folder.mkdir(parents=True, exist_ok=True)
    training = Training(given.folder)
    for name in Training.STAGES[: Training.STAGES.index(given.until) + 1]:
        if workers.rank() == 0:
            print(f"stage {name}", flush=True)
        getattr(training, name)


if __name__ == "__main__":
    main()
