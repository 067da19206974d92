"""The command line: `python -m export model | graphs | variants | adapter | demo | judge | zip | tiny | …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.errors import ExportError
from export.variants import described

CONFIGS = Path(__file__).parent / "configs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="export a checkpoint: graphs and a models.yaml entry")
    model.add_argument("source", help="folder in diffusers layout, or hub id owner/name")
    model.add_argument("--variant", help="weights variant, such as fp16")
    model.add_argument("--revision", help="hub revision")
    model.add_argument("--licence", help="licence to record in the entry")
    model.add_argument("--verify", action="store_true", help="compare every graph with torch on the real weights")
    known = commands.add_parser("graphs", help="export a model whose configs come with this program, without network")
    known.add_argument("source", choices=sorted(path.name for path in CONFIGS.iterdir()) if CONFIGS.is_dir() else [])
    variants = commands.add_parser("variants", help="enter the published variants and LoRAs of a model in models.yaml")
    variants.add_argument("source", choices=described(), help="the model, which models.yaml has")
    variants.add_argument("--out", type=Path, required=True, help="folder of models.yaml")
    for command in (model, known):
        command.add_argument("--name", required=command is model, help="name of the entry in models.yaml")
        command.add_argument("--steps", type=int, help="default number of steps to record")
        command.add_argument("--guidance", type=float, help="default guidance scale to record")
    adapter = commands.add_parser("adapter", help="add an IP-Adapter to a model that models.yaml has")
    adapter.add_argument("source", help=".safetensors file, folder with one, or owner/name:path of the hub")
    adapter.add_argument("--for", dest="model", required=True, help="name of the model's entry in models.yaml")
    adapter.add_argument("--name", required=True, help="name of the adapter in that entry")
    adapter.add_argument("--image-encoder", metavar="DIR", help="folder of its image encoder, or owner/name:folder")
    adapter.add_argument("--image-encoder-name", metavar="NAME", default="image_encoder", help="its name in the entry")
    adapter.add_argument("--lora-out", type=Path, metavar="FILE", help="write the LoRA inside a FaceID file here")
    adapter.add_argument("--revision", help="hub revision")
    adapter.add_argument("--verify", action="store_true", help="compare every graph with torch on the real weights")
    for command in (model, known, adapter):
        command.add_argument("--out", type=Path, required=True, help="folder of models.yaml and graphs/")
        command.add_argument("--dialect", choices=["fused", "cuda", "plain", "all"], default="all")
    demo = commands.add_parser("demo", help="make trained networks the demo model that is compiled into the program")
    demo.add_argument("folder", type=Path, help="holds demo, demo-refiner, demo-adapters, demo-loras, demo-pictures")
    demo.add_argument("--out", type=Path, required=True, help="folder of models.yaml, models/ and graphs/")
    demo.add_argument("--dialect", choices=["fused", "cuda", "plain", "all"], default="all")
    demo.add_argument("--steps", type=int, default=25, help="default number of steps to record (default 25)")
    demo.add_argument("--guidance", type=float, default=4.0, help="default guidance scale to record (default 4)")
    demo.add_argument("--verify", action="store_true", help="compare every graph with torch on the real weights")
    judge = commands.add_parser("judge", help="write the judge of `tronie bench --quality`: a graph and its weights")
    judge.add_argument("network", metavar="MODULE:CLASS", help="what builds it; forward gives logits and embedding")
    judge.add_argument("weights", type=Path, help="its state_dict, .safetensors")
    judge.add_argument("--out", type=Path, required=True, help="folder for judge.onnx.gz and judge.safetensors")
    judge.add_argument("--side", type=int, default=128, help="edge of its pictures in pixels (default 128)")
    tiny = commands.add_parser("tiny", help="write a small random checkpoint to test with")
    tiny.add_argument("name", help="which one; an unknown name lists them")
    tiny.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    full = commands.add_parser("random", help="write a full-size checkpoint of random weights to measure with")
    full.add_argument("--config", required=True, help="which of the configs that come with this program")
    full.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    full.add_argument("--dtype", default="f32", help="f32 (default), or f16 in files of the variant fp16")
    full.add_argument("--seed", type=int, default=0, help="which random weights (default 0)")
    full.add_argument("--shard", metavar="SIZE", help="largest weight file, such as 5GB; without it one per network")
    full.add_argument("--components", metavar="A,B", help="networks whose weights to write, such as unet,vae; else all")
    full.add_argument("--adapters", metavar="A,B", help="published IP-Adapters to write too, such as ip-adapter-plus")
    full.add_argument("--catalogue", type=Path, metavar="FILE", help="models.yaml to enter the checkpoint into")
    whole = commands.add_parser("original", help="write a checkpoint as one file in the layout of SDXL's authors")
    whole.add_argument("source", type=Path, help="folder in diffusers layout")
    whole.add_argument("--out", type=Path, required=True, help="file to write")
    whole.add_argument("--dtype", help="f32, f16 or bf16; without it the types that the files have")
    _zip(
        commands.add_parser("zip", help="merge a content and a style LoRA with mergers learned by gradients (ZipLoRA)")
    )
    return parser


def _zip(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Attention layers of the UNet that both LoRAs change are merged column by column; all other layers of either, "
        "its text encoders' too, are added up."
    )
    for side in ("content", "style"):
        command.add_argument(f"--{side}", type=Path, required=True, metavar="FILE", help=f"the {side} LoRA")
        command.add_argument(f"--prompt-{side}", metavar="TEXT", help="a prompt that calls it")
        command.add_argument(f"--images-{side}", type=Path, metavar="DIR", help="pictures; else it paints its own")
    command.add_argument("--model", required=True, help="folder in diffusers layout, or hub id owner/name")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the merged LoRA, .safetensors")
    command.add_argument("--mergers", type=Path, metavar="FILE", help="take these, learn none; ziplora-pytorch's too")
    command.add_argument("--save-mergers", type=Path, metavar="FILE", help="write the mergers beside the LoRA")
    command.add_argument("--steps", type=int, default=100, help="gradient steps (default 100)")
    command.add_argument("--lr", type=float, default=0.01, help="learning rate of AdamW (default 0.01)")
    command.add_argument("--similarity", type=float, default=0.01, help="weight of the mean |m_c m_s| (default 0.01)")
    command.add_argument("--samples", type=int, default=4, help="pictures that each LoRA paints (default 4)")
    command.add_argument("--sample-steps", type=int, default=25, help="steps of each (default 25)")
    command.add_argument("--guidance", type=float, default=5.0, help="guidance of each (default 5)")
    command.add_argument("--size", type=int, help="height and width of each in pixels (default the model's)")
    command.add_argument("--measure", type=int, default=16, help="held-out places of the final figures (default 16)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    command.add_argument("--device", default="cpu", help="torch's name of it, such as cuda")
    command.add_argument("--checkpointing", action="store_true", help="less memory for more time")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "tiny":
            from export import tiny

            tiny.write(args.name, args.out)
            return 0
        if args.command == "random":
            from export import random_checkpoint

            random_checkpoint.run(args)
            return 0
        if args.command == "variants":
            from export import variants

            return variants.run(args)
        if args.command == "original":
            from export import original_layout

            original_layout.run(args)
            return 0
        if args.command == "zip":
            from export import zip as ziplora

            return ziplora.run(args)
        if args.command == "demo":
            from export import enter_demo

            return enter_demo.run_demo(args)
        if args.command == "judge":
            from export import judge

            return judge.run(args)
        if args.command == "adapter":
            from export import add_adapter

            return add_adapter.run(args)
        from export import run

        return run.export(args)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
