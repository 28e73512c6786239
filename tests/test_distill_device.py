"""Devices of a training run that cannot be used, are full, or die: one line each."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmkd.base.errors import DeviceError, UserError
from mmkd.distill.world import join_ranks, local_device


def test_without_a_gpu_the_cores_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("warning", "message"),
    [
        ("The NVIDIA driver on your\nsystem is too old (found version 11040).", "is too old (found version 11040)"),
        ("", "the driver does not answer"),
    ],
)
def test_a_gpu_that_is_visible_and_unusable_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, warning: str, message: str
) -> None:
    def available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError) as caught, join_ranks(1.0):
        pass
    assert message in str(caught.value)
    assert str(caught.value).endswith("hide the GPU: CUDA_VISIBLE_DEVICES=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 GiB"),
            UserError,
            "too little memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB); "
            "set compute.micro_batch to less than",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
            DeviceError,
            "a GPU answers no more (CUDA error: unspecified launch failure",
        ),
    ],
)
def test_a_device_that_is_full_or_dies_ends_the_run_with_one_line(
    error: RuntimeError, kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind) as caught, join_ranks(1.0):
        raise error
    assert message in str(caught.value)
    assert str(caught.value).endswith("run the same command to go on")
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), join_ranks(1.0):
        raise RuntimeError("a bug")
