"""Many ranks, micro-batches, bf16: the same rows, the same gradients, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import quiet, write_run
from tiny_teachers import TINY

from mmkd.distill.batch import Batch, TeacherTargets
from mmkd.distill.captions import Captions, tokenised
from mmkd.distill.checkpoint import best_or_last, read
from mmkd.distill.config import LossWeights, load_run
from mmkd.distill.objective import Objective
from mmkd.distill.optimiser import learning_rate_shares, make_optimiser
from mmkd.distill.order import bucketed, epoch_order, share
from mmkd.distill.student import Towers
from mmkd.distill.update import Model, Updater
from mmkd.distill.world import World
from mmkd.store.errors import ConfigError


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5), st.integers(0, 9))
def test_buckets_hold_every_row_once_and_like_lengths_together(n: int, batch: int, window: int, epoch: int) -> None:
    rows = np.arange(n, dtype=np.int64)
    lengths = (rows * 7919) % 13
    order = epoch_order(rows, 3, epoch)
    found = bucketed(order, lengths[order], batch, window, (3, epoch))
    assert sorted(found.tolist()) == sorted(order[: n // batch * batch].tolist())
    for first in range(0, len(found), max(1, window) * batch):
        # A window holds the rows that it held before, and its batches do not overlap in length.
        span = slice(first, first + max(1, window) * batch)
        assert sorted(found[span].tolist()) == sorted(order[: n // batch * batch][span].tolist())
        if window:
            spans = [(lengths[b].min(), lengths[b].max()) for b in found[span].reshape(-1, batch)]
            spans.sort()
            assert all(low[1] <= high[0] for low, high in zip(spans, spans[1:], strict=False))
    assert np.array_equal(found, bucketed(order, lengths[order], batch, window, (3, epoch)))


@given(st.integers(1, 8), st.integers(1, 4))
def test_shares_of_all_ranks_are_the_batch(part: int, power: int) -> None:
    ranks = 2**power // 2
    batch = np.arange(part * ranks) * 5
    assert np.concatenate([share(batch, rank, ranks) for rank in range(ranks)]).tolist() == batch.tolist()


@settings(max_examples=20)
@given(st.lists(st.text("abcdefg hijk", max_size=80), min_size=1, max_size=8, unique=True))
def test_captions_come_back_as_the_tokenizer_gave_them(texts: list[str]) -> None:
    tokenise = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    captions = tokenised(texts, tokenise)
    numbers = np.arange(len(texts))[::-1].copy()
    assert torch.equal(captions.tokens(numbers, 16), tokenise(texts[::-1]))
    length = captions.padded_length(numbers, whole=False)
    assert length in (8, 16)
    assert torch.equal(captions.tokens(numbers, length), tokenise(texts[::-1])[:, :length])


def parts(seed: int = 0, rows: int = 12) -> tuple[Model, Batch]:
    """A tiny float64 model with two teachers, and a batch in which the second teacher lacks rows."""
    torch.manual_seed(seed)
    model = Model(
        Towers(open_clip.CLIP(**TINY | {"text_cfg": TINY["text_cfg"] | {"width": 16}})),
        Objective(LossWeights(), 24, [6, 8]),
    ).double()
    targets = tuple(
        TeacherTargets(torch.randn(rows, e), torch.randn(rows, e), torch.rand(rows) < p) for e, p in ((6, 2), (8, 0.6))
    )
    batch = Batch(
        step=0,
        epoch=0,
        rows=np.arange(rows),
        positions=torch.arange(rows),
        images=torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8),
        tokens=torch.randint(1, 49408, (rows, 16)),
        groups=torch.arange(rows) % 9,
        targets=targets,
    )
    return model, batch


def gradients(model: Model, batch: Batch, micro: int | None) -> dict[str, torch.Tensor]:
    """Of one update with a learning rate of zero."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    update = Updater(model, model.towers, optimiser, 1e9, World(torch.device("cpu")), torch.float32, micro, seed=0)
    outcome = update(batch)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"term {name}": term for name, term in outcome.terms.items()}


@pytest.mark.parametrize("micro", [1, 5, 6, 11])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    model, batch = parts()
    whole = gradients(model, batch, None)
    assert len(whole) == len(list(model.parameters())) + 3
    for name, value in gradients(model, batch, micro).items():
        # Features pass through float32, hence not 1e-12.
        assert torch.allclose(value.double(), whole[name].double(), rtol=1e-4, atol=1e-6), name


def test_micro_batches_leave_batch_norms_as_one_pass_does() -> None:
    norm = torch.nn.BatchNorm1d(4)
    from mmkd.distill.update import _statistics_kept

    with torch.no_grad(), _statistics_kept(norm):
        norm(torch.randn(8, 4) + 3)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0] * 4
    assert norm.momentum == 0.1


def test_short_captions_give_the_features_of_padded_ones() -> None:
    model, _ = parts()
    captions = tokenised(["a b", "c d e f"], open_clip.tokenizer.SimpleTokenizer(context_length=16))
    assert isinstance(captions, Captions)
    numbers = np.arange(2)
    short, padded = (model.towers.encode_tokens(captions.tokens(numbers, n)) for n in (8, 16))
    assert torch.allclose(short, padded, atol=1e-12)
    assert model.towers.takes_short_captions(captions.tokens(numbers, 16), 8)
    # A tower that looks at the last place of the context is found out.
    model.towers.student.text_pool_type = "last"  # type: ignore[assignment]
    assert not model.towers.takes_short_captions(captions.tokens(numbers, 16), 8)


def test_matrices_are_decayed_and_lower_layers_learn_more_slowly() -> None:
    model, _ = parts()
    config = load_run_optimiser(weight_decay=0.2, layer_decay=0.5)
    shares = learning_rate_shares(model, 0.5)
    student = "towers.student."
    assert shares[f"{student}visual.proj"] == shares["objective.heads.0.weight"] == shares[f"{student}logit_scale"] == 1
    assert shares[f"{student}visual.transformer.resblocks.0.ln_1.weight"] == 0.5
    assert shares[f"{student}transformer.resblocks.0.mlp.c_fc.weight"] == 0.5
    assert shares[f"{student}visual.conv1.weight"] == shares[f"{student}token_embedding.weight"] == 0.25
    optimiser = make_optimiser(model, config)
    for group in optimiser.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.2}
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(list(model.parameters()))
    deep = learning_rate_shares(torch.nn.ModuleDict({"student": open_clip.create_model("RN50").visual.layer1}), 0.5)
    assert set(deep.values()) == {1.0}  # no tower of ours


def load_run_optimiser(**changes: float):  # type: ignore[no-untyped-def]
    """An optimiser's configuration."""
    from mmkd.distill.config import OptimiserConfig

    return OptimiserConfig.model_validate(changes)


TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = "import sys, torch; torch.set_num_threads(1); from mmkd.cli.main import main; sys.argv[0] = 'mmkd'; main()"


def under_torchrun(folder: Path, *arguments: str) -> list[str]:
    """A command line of `mmkd` for two ranks."""
    script = folder / "mmkd_main.py"
    script.write_text(TRAIN)
    return [*TORCHRUN, str(script), *arguments]


def test_two_ranks_take_the_steps_of_one_and_resume_each_other(scene: Path, tmp_path: Path) -> None:
    def changes(epochs: int = 1) -> dict[str, object]:
        return {"epochs": epochs, "optimiser": {"lr": 1e-4, "warmup_steps": 2, "average": 0.9}}

    alone, both = (load_run(write_run(scene, name, **changes())) for name in ("alone", "both"))
    quiet(alone)
    done = subprocess.run(
        under_torchrun(tmp_path, "distill", str(scene / "both.yaml")), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: mmkd export") == 1
    (_, one), (_, two) = (read(best_or_last(config.out)) for config in (alone, both))
    assert one.progress == two.progress
    for name, value in one.tensors.items():
        if ".exp_avg_sq" not in name:
            assert torch.allclose(value, two.tensors[name], atol=2e-6), name


def test_a_batch_that_ranks_cannot_share_is_refused(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkd.distill.prepare import prepare

    config = load_run(write_run(scene, "odd", batch_size=25))
    with pytest.raises(ConfigError, match="batch_size 25 cannot be shared equally by 2 ranks; take 24"):
        prepare(config, World(torch.device("cpu"), 0, 2))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(scene: Path, tmp_path: Path) -> None:
    path = write_run(scene, "dying", epochs=5000)
    process = subprocess.Popen(
        under_torchrun(tmp_path, "distill", str(path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "pairs" in process.stdout.readline()
    time.sleep(2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), 9)
    started = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    assert json.dumps("Traceback") not in errors


@pytest.mark.parametrize(
    "compute", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"micro_batch": 7}], ids=str
)
def test_ways_to_compute_give_nearly_the_same_losses(scene: Path, compute: dict[str, object]) -> None:
    name = "-".join(compute)
    plain = quiet(write_run(scene, f"plain-{name}", epochs=1)).losses
    other = quiet(write_run(scene, f"other-{name}", epochs=1, compute=compute)).losses
    tolerance = 0.03 if "precision" in compute else 1e-4
    assert other == pytest.approx(plain, rel=tolerance)
    assert ("precision" not in compute) or other != plain


@pytest.mark.slow
def test_compiled_towers_give_nearly_the_same_losses(scene: Path) -> None:
    plain = quiet(write_run(scene, "eager", epochs=1)).losses
    compiled = quiet(write_run(scene, "compiled", epochs=1, compute={"compile": True})).losses
    assert compiled == pytest.approx(plain, rel=1e-3)
