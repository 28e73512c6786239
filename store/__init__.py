"""The feature store: plain Zarr v3 and Parquet, memory-mapped, without torch and dask."""

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
