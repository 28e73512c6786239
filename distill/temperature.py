"""CLIP's temperature, as the logarithm that is learned (arXiv 2103.00020, section 2.5)."""

from __future__ import annotations

import math

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Its first value."""
MAX_LOG_SCALE = math.log(100)
"""CLIP clips it here."""
