"""Other layouts into a store and out of it; each layout has its file."""

from __future__ import annotations
