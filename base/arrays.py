"""Short names of arrays by their numbers; a shape is said where an array is described."""

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Objects = NDArray[np.object_]
"""Text, and None where there is none."""
