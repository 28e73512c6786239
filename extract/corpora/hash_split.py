"""Splits for sets that were published without: drawn by a hash, so that a key falls alike whatever else is there."""

from __future__ import annotations

import hashlib

from pydantic import Field, model_validator

from mmkd.base.config import Frozen


class Draw(Frozen):
    """Shares of the splits. They are expectations: every sample, or group of them, falls by itself."""

    train: float = Field(default=0.0, ge=0, le=1)
    val: float = Field(default=0.0, ge=0, le=1)
    test: float = Field(gt=0, le=1)
    by: str = "key"
    """What falls as one: the sample's `key`, its file's `name` or `stem`, or a label such as the patient."""
    seed: int = 0

    @model_validator(mode="after")
    def _shares_are_one(self) -> Draw:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"shares of draw make {total:g}, expected 1")
        return self

    def split(self, dataset: str, value: str | None) -> str | None:
        """Where a value falls; nowhere when there is none."""
        if value is None:
            return None
        digest = hashlib.sha256(f"{dataset}/{self.seed}/{value}".encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.test:
            return "test"
        return "val" if place < self.test + self.val else "train"
