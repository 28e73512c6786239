"""The feature store: plain Zarr v3 and Parquet, memory-mapped, without torch and dask. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkd.base.errors import MmkdError, StoreError, UserError
    from mmkd.store.card import Preprocessing, TeacherCard
    from mmkd.store.layout import IMAGE_SOUND, PAIR_SOUND, TEXT_SOUND
    from mmkd.store.reader import FeatureStore
    from mmkd.store.summary import StoreSummary
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

_HOME = {
    "IMAGE_SOUND": "mmkd.store.layout",
    "PAIR_SOUND": "mmkd.store.layout",
    "TEXT_SOUND": "mmkd.store.layout",
    "FeatureStore": "mmkd.store.reader",
    "MmkdError": "mmkd.base.errors",
    "Preprocessing": "mmkd.store.card",
    "StoreError": "mmkd.base.errors",
    "StoreSummary": "mmkd.store.summary",
    "TeacherCard": "mmkd.store.card",
    "UserError": "mmkd.base.errors",
    "VerifyReport": "mmkd.store.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
