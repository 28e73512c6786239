"""Many ranks, micro-batches, bf16: the same rows, the same gradients, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from forked import forked_ranks, launched, peaceful, ranks_of, under_torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import load, run
from open_clip.model import set_model_preprocess_cfg
from tiny_model import objective, parts
from tiny_run import assert_equal_ends, quiet, write_run, write_scene
from tiny_teachers import TINY

from mmkd.base.errors import ConfigError
from mmkd.distill.batches import Batch, share
from mmkd.distill.captions import tokenize_captions
from mmkd.distill.checkpoint import checkpoints, find_checkpoint, read
from mmkd.distill.config import OptimizerConfig, load_run
from mmkd.distill.optimizer import learning_rate_shares, make_optimizer
from mmkd.distill.prepare import prepare
from mmkd.distill.student import Towers
from mmkd.distill.train_step import Model, Updater
from mmkd.distill.trainer import train
from mmkd.distill.world import World


@cache
def tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    """CLIP's own, for sixteen tokens."""
    return open_clip.tokenizer.SimpleTokenizer(context_length=16)


@given(st.integers(1, 8), st.integers(1, 4))
def test_shares_of_all_ranks_are_the_batch(part: int, power: int) -> None:
    ranks = 2**power // 2
    batch = np.arange(part * ranks) * 5
    assert np.concatenate([share(batch, rank, ranks) for rank in range(ranks)]).tolist() == batch.tolist()


@settings(max_examples=20)
@given(st.lists(st.text("abcdefg hijk", max_size=80), min_size=1, max_size=8, unique=True))
def test_captions_come_back_as_the_tokenizer_gave_them(texts: list[str]) -> None:
    tokenise = tokenizer()
    captions = tokenize_captions(texts, tokenise)
    numbers = np.arange(len(texts))[::-1].copy()
    assert torch.equal(captions.tokens(numbers), tokenise(texts[::-1]))
    for row, columns in zip(captions.tokens(numbers), captions.columns(numbers), strict=True):
        assert columns in (8, 16)
        assert (row[columns:] == captions.pad).all()


def gradients(model: Model, batch: Batch, micro: int | None) -> dict[str, torch.Tensor]:
    """Of one update with a learning rate of zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    update = Updater(model, model.towers, optimizer, 1e9, World(torch.device("cpu")), torch.float32, micro, seed=0)
    outcome = update(batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"term {name}": term for name, term in outcome.terms.items()}


@pytest.mark.parametrize("micro", [1, 5, 6, 11])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    model, batch = parts()
    whole = gradients(model, batch, None)
    assert len(whole) == len(list(model.parameters())) + 3
    for name, value in gradients(model, batch, micro).items():
        assert (value - whole[name]).abs().max() <= 3e-6 * whole[name].abs().max(), name


def test_micro_batches_leave_batch_norms_as_one_pass_over_each_does() -> None:
    _, batch = parts()
    clip = open_clip.CLIP(**TINY | {"vision_cfg": RESNET, "text_cfg": TINY["text_cfg"] | {"width": 16}})
    set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    towers, by_hand = Towers(clip), Towers(deepcopy(clip))
    for piece in batch.images.split(6):
        by_hand.encode_images(piece)
    gradients(Model(towers, objective()), batch, 6)
    for name, value in by_hand.state_dict().items():
        if "running_" in name:
            assert torch.equal(towers.state_dict()[name], value), name


def test_matrices_are_decayed_and_lower_layers_learn_more_slowly() -> None:
    model, _ = parts()
    config = OptimizerConfig(weight_decay=0.2, layer_decay=0.5)
    shares = learning_rate_shares(model, OptimizerConfig(layer_decay=0.5))
    student = "towers.student."
    for name in (f"{student}visual.proj", "objective.heads.maps.0.weight", f"{student}logit_scale"):
        assert shares[name] == 1
    assert shares[f"{student}visual.transformer.resblocks.0.ln_1.weight"] == 0.5
    assert shares[f"{student}transformer.resblocks.0.mlp.c_fc.weight"] == 0.5
    assert shares[f"{student}visual.conv1.weight"] == shares[f"{student}token_embedding.weight"] == 0.25
    optimizer = make_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            free = parameter.ndim < 2 or names[parameter].endswith(("positional_embedding", "class_embedding"))
            assert group["weight_decay"] == (0.0 if free else 0.2), names[parameter]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
GENTLE = {"epochs": 1, "optimizer": {"lr": 1e-4, "warmup_steps": 2, "average": 0.9}}


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_steps_of_one_and_resume_each_other(training_scene: Path, ranks: int) -> None:
    """With micro-batches too: gradients are cached and exchanged once, and the losses see the whole batch."""
    alone, many = (load_run(write_run(training_scene, f"{name}-{ranks}", **GENTLE)) for name in ("alone", "many"))
    # One process takes the first step, many take the others.
    train(many, say=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    path = write_run(training_scene, f"many-{ranks}", **GENTLE, compute={"micro_batch": 5})
    children = forked_ranks(ranks, quiet, path)
    quiet(alone)
    peaceful(children)
    assert_equal_ends(alone, many)


def test_equal_captions_and_images_of_other_ranks_are_positives(tmp_path: Path) -> None:
    """Forty-eight rows of twelve images and eight captions: every batch of sixteen has equal ones in both ranks."""
    write_scene(tmp_path, rows=48)
    rows = [f"k{i},images/{i % 12}.png,finding {i % 8},CT,s0" for i in range(48)]
    (tmp_path / "corpus/pairs.csv").write_text("\n".join(["key,image,caption,modality,site", *rows]))
    folders = {name: tmp_path / name for name in ("one", "two")}
    run(tmp_path / "corpus/pairs.csv", tmp_path / "repeated", load(folders, *folders))
    changes = GENTLE | {"store": "repeated", "batch_size": 16}
    paths = {name: write_run(tmp_path, name, **changes) for name in ("alone", "both")}
    paths["distinct"] = write_run(tmp_path, "distinct", **changes, loss={"equal_captions": False})
    peaceful(forked_ranks(2, quiet, paths["both"]))
    quiet(paths["alone"])
    quiet(paths["distinct"])
    alone, both, distinct = (load_run(path) for path in paths.values())
    assert_equal_ends(alone, both)
    a, other = (read(find_checkpoint(config.out)).tensors for config in (alone, distinct))
    assert max((value - other[name]).abs().max() for name, value in a.items()) > 1e-4


def test_a_piece_of_one_row_under_batch_norm_is_refused(training_scene: Path) -> None:
    (training_scene / "resnet.json").write_text(json.dumps(TINY | {"vision_cfg": RESNET}))
    changes = {"student": {"model": "resnet.json"}, "batch_size": 16}
    for micro, norm, fails in ((5, "sync", True), (1, "sync", True), (6, "sync", False), (5, "frozen", False)):
        compute = {"micro_batch": micro, "batch_norm": norm}
        config = load_run(write_run(training_scene, "piece", **changes, compute=compute))
        with pytest.raises(ConfigError, match="a piece of one row") if fails else nullcontext():
            prepare(config, World(torch.device("cpu")))


def test_a_loss_that_is_not_a_number_names_the_rows_of_all_ranks(training_scene: Path) -> None:
    path = write_run(training_scene, "nan-ranks", optimizer={"lr": 1e30, "warmup_steps": 0})
    children = forked_ranks(2, quiet, path)
    for child in children:
        child.join()
        assert child.exitcode == 1
    config = load_run(path)
    note = json.loads((config.out / "bad-batch.json").read_text())
    (_, _, _, rows) = next(prepare(config, World(torch.device("cpu"))).batches.plan.steps(1))
    assert (note["step"], note["rows"]) == (1, rows.tolist())
    assert checkpoints(config.out) == []


def test_a_rank_that_dies_ends_the_run(training_scene: Path) -> None:
    path = write_run(training_scene, "dying", epochs=5000, checkpoints={"every_steps": 3})
    first, second = forked_ranks(2, quiet, path)
    while not checkpoints(load_run(path).out):
        time.sleep(0.05)
        assert first.is_alive()
    second.kill()
    first.join(timeout=60)
    assert first.exitcode == 1


@pytest.mark.slow
def test_torchrun_trains_as_one_process_and_ends_when_a_rank_dies(training_scene: Path, tmp_path: Path) -> None:
    alone, both = (load_run(write_run(training_scene, name, **GENTLE)) for name in ("by-itself", "torchrun"))
    quiet(alone)
    command = under_torchrun("distill", str(training_scene / "torchrun.yaml"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: mmkd export") == 1
    assert_equal_ends(alone, both)
    path = write_run(training_scene, "dying-too", epochs=5000, checkpoints={"every_steps": 3})
    with launched(path, tmp_path / "log") as process:
        while not checkpoints(load_run(path).out):
            time.sleep(0.2)
            assert process.poll() is None
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        assert process.wait(timeout=120) != 0


def test_a_batch_that_ranks_cannot_share_is_refused(training_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run(write_run(training_scene, "odd", batch_size=25))
    with pytest.raises(ConfigError, match="batch_size 25 cannot be shared equally by 2 ranks; take 24"):
        prepare(config, World(torch.device("cpu"), 0, 2))
