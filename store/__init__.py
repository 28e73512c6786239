"""The feature store: plain Zarr v3 and Parquet, memory-mapped, without torch and dask. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkd.base.errors import MmkdError, StoreError, UserError
    from mmkd.store.card import Preprocessing, TeacherCard
    from mmkd.store.layout import IMAGE_SOUND, PAIR_SOUND, TEXT_SOUND
    from mmkd.store.reader import FeatureStore, StoreSummary
    from mmkd.store.verify import VerifyReport

__all__ = [
    "IMAGE_SOUND",
    "PAIR_SOUND",
    "TEXT_SOUND",
    "FeatureStore",
    "MmkdError",
    "Preprocessing",
    "StoreError",
    "StoreSummary",
    "TeacherCard",
    "UserError",
    "VerifyReport",
]

_MODULES = {
    "mmkd.base.errors": ("MmkdError", "StoreError", "UserError"),
    "mmkd.store.card": ("Preprocessing", "TeacherCard"),
    "mmkd.store.layout": ("IMAGE_SOUND", "PAIR_SOUND", "TEXT_SOUND"),
    "mmkd.store.reader": ("FeatureStore", "StoreSummary"),
    "mmkd.store.verify": ("VerifyReport",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
