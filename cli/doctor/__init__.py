"""`mmkd doctor`: what this machine has and lacks for each stage."""

from __future__ import annotations
