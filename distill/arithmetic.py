"""Floating-point operations of a training step, and what share they are of what the device could do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmkd.base.arithmetic import peak_tflops
from mmkd.distill.student import Towers, image_size


@dataclass(frozen=True)
class Arithmetic:
    """Of a run. sample_flops: operations of a step for one pair, two for a multiply-add, of the towers alone. ranks:
    devices that share the pairs. peak: TFLOP/s of one of them; 0.0 where it is not known."""

    sample_flops: float
    ranks: int
    peak: float

    def rates(self, samples_per_second: float) -> dict[str, float]:
        """Return achieved TFLOP/s of a device, and its share of the peak (model FLOPs utilization) where known."""
        tflops = samples_per_second * self.sample_flops / self.ranks / 1e12
        return {"tflops": tflops} | ({"mfu": tflops / self.peak} if self.peak else {})


@torch.no_grad()
def count_arithmetic(towers: Towers, context: int, ranks: int, *, half: bool) -> Arithmetic:
    """Count the forward pass of one pair whose caption fills the context; backward takes twice as much for towers that
    learn. What a step computes twice (GradCache, checkpointing) counts once."""
    device = towers.mean.device
    image = torch.zeros(1, 3, *image_size(towers.student), dtype=torch.uint8, device=device)
    tokens = torch.ones(1, context, dtype=torch.long, device=device)
    training, fast = towers.training, torch.backends.mha.get_fastpath_enabled()
    learned = {name for name, parameter in towers.student.named_parameters() if parameter.requires_grad}
    towers.eval().requires_grad_(False)  # the counter hooks the gradient of a parameter that a module is called with
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows neither it nor a CPU's attention
    try:
        total = 0.0
        for encode, inputs, visual in ((towers.encode_images, image, True), (towers.encode_tokens, tokens, False)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                encode(inputs)
            learns = any(name.startswith("visual.") == visual for name in learned)
            total += counter.get_total_flops() * (3 if learns else 1)
    finally:
        towers.train(training)
        for name, parameter in towers.student.named_parameters():
            parameter.requires_grad_(name in learned)
        torch.backends.mha.set_fastpath_enabled(fast)
    cuda = device.type == "cuda"
    peak, _ = peak_tflops(torch.cuda.get_device_name(device) if cuda else "cpu", half)
    return Arithmetic(total, ranks, peak * (1 if cuda else torch.get_num_threads()))
