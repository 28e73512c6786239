"""The forward pass of CLIP's ViT-B/32 and ResNet-50 (random weights) on one core, 32 rows: memory format of the
weights, `torch.compile` and half precision; and captions cut to their length against padded ones. The defaults of
extraction follow from it.

With captions in order of length cut to 16, 32, 48, 64 and 77 tokens, 0.77 of the columns of 2,048 captions of 8 to 40
words hold tokens. What is left is the width of the steps: of 8 tokens it would be 0.86, of 4 tokens 0.91. That is not
done: a matrix product of another shape may round differently, so the bytes of every store would change, and each length
is a shape of its own for the kernels of a device, and for `torch.compile`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mmkd.benchmarks.extract import write_teacher
from mmkd.benchmarks.result import Row, main
from mmkd.extract.encode import cut_lengths
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.teachers.loaded import LoadedTeacher

ROWS = 32


def loaded(folder: Path, device: torch.device) -> LoadedTeacher:
    """The teacher of a folder, as extraction loads it."""
    spec = TeacherSpec(slug="one", source=f"local-dir:{folder}")
    teacher = load_teacher(spec, describe_teacher(spec), device)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


def seconds(passes: dict[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turn after a round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns + 1):
        for name, call in passes.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def image_rows(folder: Path, name: str, turns: int, device: torch.device) -> list[Row]:
    """Variants of one image tower."""
    plain, last, compiled, half = (loaded(folder, device) for _ in range(4))
    plain.tune(channels_last=False)
    compiled.tune(compiled=True)
    half = half.in_precision("bf16")
    pixels = torch.randint(0, 256, (ROWS, 3, 224, 224), dtype=torch.uint8, device=device)
    variants = {"plain": plain, "channels-last": last, "compiled, channels-last": compiled, "bf16, channels-last": half}
    calls: dict[str, Callable[[], object]] = {key: partial(one.encode_images, pixels) for key, one in variants.items()}
    found = seconds(calls, turns, device)
    against = "contiguous weights, float32"
    kind = "gpu" if device.type == "cuda" else "cpu"
    return [
        Row(what=f"{name}: {key}", against=against, value=found[key], reference=found["plain"], unit="s", device=kind)
        for key in variants
        if key != "plain"
    ]


def text_row(folder: Path, turns: int, device: torch.device) -> Row:
    """64 captions of 8 to 40 words, as those of figures are: cut to their lengths, and padded to the context."""
    teacher = loaded(folder, device)
    rng = np.random.default_rng(0)
    words = ["lesion", "of", "the", "left", "lower", "lobe", "axial", "ct", "with", "contrast", "normal", "heart"]
    tokens, _ = teacher.tokenize([" ".join(rng.choice(words, count)) for count in rng.integers(8, 41, size=2 * ROWS)])
    cut = cut_lengths(tokens, teacher.text_lengths)
    groups = [tokens[np.flatnonzero(cut == length)][:, :length] for length in np.unique(cut)]
    passes = [group[start : start + ROWS].to(device) for group in groups for start in range(0, len(group), ROWS)]
    # On a CPU a pass has 32 rows, always: what is left over is filled up.
    filled = [torch.cat([one, one[-1:].expand(ROWS - len(one), -1)]) for one in passes]
    whole = [part.to(device) for part in tokens.split(ROWS)]  # type: ignore[no-untyped-call]
    calls: dict[str, Callable[[], object]] = {
        "cut": lambda: [teacher.encode_texts(one) for one in filled],
        "whole": lambda: [teacher.encode_texts(one) for one in whole],
    }
    found = seconds(calls, turns, device)
    what = f"text tower, {2 * ROWS} captions of 8 to 40 words, cut to {len(groups)} lengths"
    kind = "gpu" if device.type == "cuda" else "cpu"
    return Row(
        what=what,
        against="padded to 77",
        value=found["cut"],
        reference=found["whole"],
        unit="s",
        goal="< 1",
        device=kind,
    )


def measure(full: bool) -> list[Row]:
    """Rows for the page."""
    turns = 10 if full else 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vit = write_teacher(folder / "vit", 0, 12)
        resnet = write_teacher(folder / "resnet", 0, 1, resnet=True)
        return [
            *image_rows(vit, "ViT-B/32", turns, device),
            *image_rows(resnet, "ResNet-50", turns, device),
            text_row(vit, turns, device),
        ]


if __name__ == "__main__":
    main(measure)
