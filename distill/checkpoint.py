"""A run's state on disk: whole or not there, and read without unpickling."""

from __future__ import annotations

import hashlib
import io
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mmkd.distill.config import RunConfig
from mmkd.store.atomic import write_atomically
from mmkd.store.errors import CorruptStoreError, UserError

CHECKPOINT = "checkpoint.pt"
CONFIG = "run.json"


def config_digest(config: RunConfig) -> str:
    """Digest of what decides a run's outcome; where it writes and how many loaders it has do not."""
    content = config.model_dump_json(exclude={"out", "loader_workers", "checkpoint_steps"})
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def save(config: RunConfig, model: nn.Module, optimiser: Optimizer, decay: LRScheduler, step: int) -> None:
    """Write the state after `step` steps in place of the one before.

    Raises:
        StoreError: the disk is full or read-only; the checkpoint before stays.
    """
    state = {
        "step": step,
        "config": config_digest(config),
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "decay": decay.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(config.out / CHECKPOINT, buffer.getbuffer())


def load(config: RunConfig) -> dict[str, Any] | None:
    """The state that `save` wrote, or None for a new run.

    Raises:
        UserError: the folder holds a run of another configuration.
        CorruptStoreError: the file is damaged.
    """
    path = config.out / CHECKPOINT
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise CorruptStoreError(f"{path} is damaged; delete it to start the run anew") from error
    if state["config"] != config_digest(config):
        raise UserError(f"{config.out} holds a run of another configuration; name another `out`, or delete that folder")
    return state
