"""What a device could compute at most, in floating-point operations a second (two for a multiply-add)."""

from mmkd.base.notes import read_note

STATED = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "T4": 65}
"""TFLOP/s of dense products in half precision by NVIDIA's data sheets; the first name that is part of the device's."""
PEAK = "peak"
"""Kind of the notes that `mmkd doctor` makes: device and `half` or `fp32` to TFLOP/s; on a CPU, of one core."""


def peak_tflops(device: str, half: bool) -> tuple[float, str]:
    """Return the device's peak and where it comes from; 0.0 where neither `mmkd doctor` nor a data sheet says."""
    if measured := read_note(PEAK, [device, "half" if half else "fp32"]):
        return float(measured), "measured by mmkd doctor"
    stated = next((peak for name, peak in STATED.items() if name in device), 0) if half else 0
    return float(stated), "by its data sheet"


def arithmetic_text(flops_a_second: float, peak: float, source: str) -> str:
    """Return achieved arithmetic, and what share it is of a peak in TFLOP/s (model FLOPs utilization), if known."""
    achieved = flops_a_second / 1e12
    if 0 < peak < achieved:
        return f"{achieved:.3g} TFLOP/s, above the peak of {peak:.3g} {source}; run `mmkd doctor` on the idle machine"
    share = f", MFU {achieved / peak:.1%} of {peak:.3g} {source}" if peak else "; `mmkd doctor` measures the peak"
    return f"{achieved:.3g} TFLOP/s{share}"
