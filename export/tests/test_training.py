"""Training of the demo model: its parts against diffusers, and stages that go on where they stopped."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from export.demo import captions, people, styles
from export.demo.training import networks, saved, train_base, train_clip, train_lightning
from export.demo.training.judge import JUDGED, Judge, by_name
from export.demo.training.muon import orthogonal
from export.demo.training.stage import Stage
from export.demo.training.texts import Texts, fill_unknown, said
from export.demo.training.train_base import ADAPTERS, Pictures, Seen
from export.demo.training.world import PER_PERSON, World, levels
from torch import nn


def test_muon_makes_singular_values_about_one() -> None:
    chance = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=chance) for shape in ((6, 40), (40, 6), (6, 12), (30, 50))]
    for matrix, made in zip(matrices, orthogonal(matrices), strict=True):
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert ((u.T @ made @ v.T).diag() - values.mean()).abs().max() < 0.5


def test_a_stage_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(folder: Path) -> Stage:
        torch.manual_seed(1)
        folder.mkdir(exist_ok=True)
        return Stage("some", folder, {"net": nn.Linear(8, 8)}, 20, 1e-2)

    def losses(net: nn.Module, stop: int):
        def loss(step: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return {"loss": net(torch.randn(4, 8, generator=chance)).square().mean()}

        return loss

    whole, cut, rest = stage(tmp_path / "a"), stage(tmp_path / "b"), stage(tmp_path / "b")
    whole.run(losses(whole.nets["net"], -1))
    monkeypatch.setattr("export.demo.training.stage._KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        cut.run(losses(cut.nets["net"], 11))
    rest.run(losses(rest.nets["net"], 3))
    assert torch.equal(whole.nets["net"].weight, rest.nets["net"].weight)


def test_steps_of_a_path_are_those_of_diffusers() -> None:
    scheduler = EulerDiscreteScheduler(**networks.SCHEDULE)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.int().tolist() == train_lightning.grid(4)
    alphas = networks.schedule().alphas_cumprod
    chance = torch.Generator().manual_seed(1)
    velocities = [torch.randn(1, 8, 16, 16, generator=chance) for _ in range(4)]
    noise = torch.randn(1, 8, 16, 16, generator=chance)
    ours, theirs = noise * (1.0 - alphas[999]).sqrt(), noise * scheduler.sigmas[0]
    signal = [*(float(alphas[t]) for t in train_lightning.grid(4)), 1.0]
    for step, time in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(theirs, time)
        ours = train_lightning.moved(ours, velocities[step], signal[step], signal[step + 1])
        theirs = scheduler.step(velocities[step], time, theirs).prev_sample
    assert (ours - theirs).abs().max() < 2e-4


def test_words_that_no_caption_has_are_alike() -> None:
    texts, encoder = Texts(), networks.text_encoder()
    known = said(texts)
    for number in range(200):
        chance = random.Random(number)
        assert known.issuperset(texts([captions.caption(people.portrait(chance), chance)])[0].unique().tolist())
    fill_unknown(encoder, known)
    table = encoder.get_input_embeddings().weight
    unknown = texts(["cathedral zebra"])[0][0, 1:3]
    assert not known.intersection(unknown.tolist())
    assert torch.equal(table[unknown[0]], table[unknown[1]])
    assert not torch.equal(table[unknown[0]], table[texts(["woman"])[0][0, 1]])


def test_an_image_encoder_begins_with_weights_that_see_details_and_places() -> None:
    world, image = World(3, 20), networks.image_encoder()
    pictures = np.stack([np.asarray(styles.render(world.portrait(index))) for index in range(world.pictures)])
    train_clip.begin(image, pictures)
    embeddings = image.vision_model.embeddings
    with torch.no_grad():
        seen = embeddings.patch_embedding(train_clip.pixels(levels(pictures))).transpose(0, 1).flatten(1)
    spread = seen.square().mean(dim=1).sqrt()
    assert spread.min() > 0.5 and spread.max() < 1.1
    places = embeddings.position_embedding.weight[1:]
    assert torch.cdist(places, places).fill_diagonal_(9.0).min() > 0.5


def test_pairs_are_two_pictures_of_each_person() -> None:
    first, second = np.split(np.array(World(3, 20).pairs(8, random.Random(1))), 2)
    assert (first // PER_PERSON == second // PER_PERSON).all() and (first != second).all()


def test_text_encoders_that_are_done_stay_while_the_base_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_base, "_BATCH", 4)
    torch.manual_seed(1)
    world, unet = World(3, 40), networks.unet()
    seen = Seen(torch.randn(world.pictures, 8, 16, 16), torch.randn(world.pictures, 65, 96), 1.0, torch.zeros(65, 96))
    own = {
        "unet": unet,
        "projections": train_base.with_adapters(unet, {name: networks.image_projection() for name in ADAPTERS}),
        "readers": train_base.readers(),
    }
    frozen = {"first": networks.text_encoder(), "second": networks.text_encoder_2()}
    every = [weight for net in (*own.values(), *frozen.values()) for weight in net.parameters()]
    before = [weight.detach().clone() for weight in every]
    train_base.train(Stage("longer", tmp_path, own, 3, 1e-3, frozen=frozen), world, seen)
    changed = [not torch.equal(weight, old) for weight, old in zip(every, before, strict=True)]
    learning = sum(len(list(net.parameters())) for net in own.values())
    assert sum(changed[:learning]) > 0.9 * learning and not any(changed[learning:])


def test_batches_pair_a_person_with_their_pictures_and_a_style_with_its_own() -> None:
    world = World(3, 40)
    batch = Pictures(world).batch(random.Random(1))
    assert {None} < set(batch.seen["face"]) and {None} < set(batch.seen["style"])
    for picture, face, style in zip(batch.pictures, batch.seen["face"], batch.seen["style"], strict=True):
        if face is not None:
            assert face != picture and face // PER_PERSON == picture // PER_PERSON
        if style is not None:
            assert world.portrait(style).style == world.portrait(picture).style


def test_saved_adapters_are_read_by_diffusers_as_they_were_trained(tmp_path: Path) -> None:
    torch.manual_seed(1)
    unet, image, vae = networks.unet(), networks.image_encoder(), networks.vae()
    projections = train_base.with_adapters(unet, {name: networks.image_projection() for name in ADAPTERS})
    for processor in unet.attn_processors.values():
        for layer in (*getattr(processor, "to_k_ip", ()), *getattr(processor, "to_v_ip", ())):
            nn.init.normal_(layer.weight)
    bare = saved.without_adapters(unet)
    saved.base(tmp_path / "demo", bare, networks.text_encoder(), networks.text_encoder_2(), vae)
    saved.adapters(tmp_path / "adapters", image, unet, projections)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "demo", torch_dtype=torch.float32)
    folders, files = zip(*(file.split("/") for file in saved.FILES.values()), strict=True)
    pipeline.load_ip_adapter(
        str(tmp_path / "adapters"), subfolder=list(folders), weight_name=list(files), image_encoder_folder=saved.ENCODER
    )
    features = torch.randn(1, 65, networks.VISION_WIDTH, generator=torch.Generator().manual_seed(2))
    seen = Seen(torch.empty(0), features, 1.0, features[0])
    given = train_base.tokens(projections, seen, {"style": [0], "face": [0]}, [False])
    loaded = pipeline.unet.encoder_hid_proj([features[:, None], features[:, None]])
    for ours, theirs in zip(given, loaded, strict=True):
        assert (ours - theirs).abs().max() < 5e-3
    for name, ours in unet.attn_processors.items():
        theirs = pipeline.unet.attn_processors[name]
        for a, b in zip(getattr(ours, "to_k_ip", ()), getattr(theirs, "to_k_ip", ()), strict=True):
            assert torch.equal(a.weight.half(), b.weight.half())


def test_the_judge_says_as_much_of_each_parameter_as_it_has_values() -> None:
    logits, embedding = Judge().eval()(torch.rand(2, 3, 128, 128))
    assert {name: part.shape[1] for name, part in by_name(logits).items()} == {n: len(v) for n, v in JUDGED.items()}
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2))


_TWO = """
import sys
from pathlib import Path
import torch
from torch import nn
from export.demo.training import workers
from export.demo.training.stage import Stage

torch.set_num_threads(1)
workers.join()
torch.manual_seed(1)
stage = Stage("some", Path(sys.argv[1]), {"net": nn.Linear(8, 8)}, 3, 1e-2)

def losses(draw, chance):
    draws = [draw] if workers.count() == 2 else [2 * draw, 2 * draw + 1]
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(one)) for one in draws]
    return {"loss": sum(stage.nets["net"](batch).square().mean() for batch in batches) / len(batches)}

stage.run(losses)
workers.once(lambda: torch.save(stage.nets["net"].weight, Path(sys.argv[1]) / "weight.pt"))
"""


def test_two_workers_learn_from_both_their_batches(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(_TWO)
    weights = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        subprocess.run(
            [sys.executable, *start, tmp_path / "two.py", folder],
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
        )
        weights.append(torch.load(folder / "weight.pt"))
    assert (weights[0] - weights[1]).abs().max() < 1e-6
