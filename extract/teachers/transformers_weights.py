"""Building a transformers model from a state dict, strictly and without noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.weights import StateDict, key_problems


def make_config(content: dict[str, Any], where: str) -> Any:
    """A transformers configuration from the content of a config.json.

    Raises:
        TeacherError: an architecture that transformers does not know, or values it refuses.
    """
    # The dtype says how the file was saved; we compute in float32 unless the spec says otherwise.
    fields = {name: value for name, value in content.items() if name not in ("model_type", "torch_dtype", "dtype")}
    kind = content.get("model_type")
    try:
        with quiet():
            return transformers.AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TeacherError(f"{where}: config.json of type {kind!r} cannot be used ({reason})") from error


def build_strictly(model_class: Any, config: Any, weights: StateDict, where: str, **arguments: Any) -> nn.Module:
    """`model_class` with `weights`: all of them, nothing more, every shape right.

    Goes through `from_pretrained`, which knows the names that older releases gave to the same tensors
    (Swin's `attention.self.query`) and the buffers they saved (`position_ids`).

    Raises:
        TeacherError: naming every missing, unexpected and ill-shaped key.
    """
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
            )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(f"{where} does not fit a {model_class.__name__} ({reason})") from error
    shapes = [
        str(key) if isinstance(key, str) else " ".join(str(part) for part in key) for key in info["mismatched_keys"]
    ]
    problems = key_problems(missing=info["missing_keys"], unexpected=info["unexpected_keys"], shapes=shapes)
    if problems:
        raise TeacherError(f"{where} does not fit a {model_class.__name__} of this config.json: {problems}")
    built: nn.Module = model
    return built.float()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing its own loading report and bar; ours is the error that names the keys."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
