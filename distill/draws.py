"""Random numbers that are a function of where they are used: no generator, no state, nothing to save."""

import torch

_GAMMA = -0x61C8864680B583EB
"""0x9E3779B97F4A7C15 as int64: the step of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195)."""


def draws(seed: int, epoch: int, positions_B: torch.Tensor, columns: int) -> torch.Tensor:
    """Draw uniform numbers in [0, 1), float64 (B, columns), a function of (seed, epoch, position, column) alone."""
    base = _split_mix(_split_mix(torch.tensor(seed % 2**63, device=positions_B.device)) ^ epoch)
    cells = _split_mix(base ^ positions_B)[:, None] ^ torch.arange(columns, device=positions_B.device)
    return _shift_right(_split_mix(cells), 11).double() * 2.0**-53


def _split_mix(state: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's output for this state; int64 arithmetic wraps as uint64 does."""
    z = state + _GAMMA
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, places: int) -> torch.Tensor:
    # Logical; int64's own keeps the sign.
    return (z >> places) & ((1 << (64 - places)) - 1)
