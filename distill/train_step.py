"""One step of training: forward, backward, over micro-batches when the share of a rank is too large at once; and its
floating-point operations, as a share of what the device could do."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mmkd.base.arithmetic import peak_tflops
from mmkd.distill.batch_norm import batch_norms
from mmkd.distill.batches import Batch, Piece
from mmkd.distill.losses import MAX_LOG_SCALE
from mmkd.distill.objective import Objective, StudentFeatures
from mmkd.distill.student import Towers, image_size
from mmkd.distill.world import World

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Model(nn.Module):
    """All learned modules: the student's towers and the objective's."""

    def __init__(self, towers: Towers, objective: Objective) -> None:
        super().__init__()
        self.towers = towers
        self.objective = objective


@dataclass(frozen=True)
class Outcome:
    """A step's numbers, over all ranks, still on the device. terms: float32 scalars by name, before weighting. total:
    their weighted sum. norm: of the gradient before clipping."""

    terms: dict[str, torch.Tensor]
    total: torch.Tensor
    norm: torch.Tensor

    def finite(self) -> bool:
        """Return False if loss or gradient is NaN or infinite; waits for the device."""
        return bool(torch.isfinite(torch.stack([self.total, self.norm])).all())

    def values(self) -> dict[str, float]:
        """Return terms and total as numbers; waits for the device."""
        return {name: term.item() for name, term in self.terms.items()} | {"total": self.total.item()}


@dataclass
class Updater:
    """Computes gradients of a batch and takes the optimizer's step."""

    model: Model
    called: nn.Module
    """The towers as they are called: compiled, and wrapped for many ranks."""
    optimizer: torch.optim.Optimizer
    clip_norm: float
    world: World
    dtype: torch.dtype
    """Autocast dtype of the towers."""
    micro_batch: int | None
    seed: int

    def __call__(self, batch: Batch) -> Outcome:
        """Change the weights by one step."""
        # Dropout is a function of (seed, step, rank): resuming needs no saved state of a generator.
        key = np.random.SeedSequence([self.seed, batch.step, self.world.rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        size = self.micro_batch or len(batch)
        terms = self._backward(batch) if size >= len(batch) else self._backward_in_pieces(batch, size)
        self.world.average_gradients(self.model.objective)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.towers.log_scale.clamp_(0, MAX_LOG_SCALE)
        self.model.objective.clamp()
        summed = dict(zip(terms, self.world.sum(torch.stack(list(terms.values()))), strict=True))
        return Outcome(summed, self.model.objective.total(summed).detach(), norm.detach())

    def _backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self._backward_loss(self._forward((batch.images, batch.tokens, batch.columns)), batch)

    def _backward_in_pieces(self, batch: Batch, size: int) -> dict[str, torch.Tensor]:
        """GradCache (Gao et al. 2021, arXiv 2101.06983): features of all pieces first, without their graphs; the loss
        of the whole batch gives the gradient of each feature; then each piece again, with its graph. The gradient is
        that of the whole batch in one piece. Towers with batch norm see each piece's own statistics."""
        pieces, device = list(batch.pieces(size)), self.world.device
        cuda = device.type == "cuda"
        states = []
        found: list[Outputs] = []
        with torch.no_grad(), _keep_statistics(self.model.towers):
            for piece in pieces:
                states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None))
                found.append(self._forward(piece, self.model.towers))
        image, text = (torch.cat([outputs[i] for outputs in found]).float().requires_grad_() for i in (0, 1))
        log_scale = found[0][2].detach().requires_grad_()
        terms = self._backward_loss((image, text, log_scale), batch)
        for number, (piece, state) in enumerate(zip(pieces, states, strict=True)):
            gradients = [_gradient(leaf)[number * size : (number + 1) * size] for leaf in (image, text)]
            last = number + 1 == len(pieces)
            # The dropout of the first pass.
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
            # Gradients go between ranks once a step, with the last piece.
            waiting = isinstance(self.called, DistributedDataParallel) and not last
            with self.called.no_sync() if waiting else nullcontext():  # type: ignore[operator]
                outputs = self._forward(piece)
                scale_gradient = _gradient(log_scale) if last else torch.zeros_like(log_scale)
                cast = [g.to(out.dtype) for g, out in zip(gradients, outputs[:2], strict=True)]
                torch.autograd.backward(outputs, [*cast, scale_gradient])
        return terms

    def _backward_loss(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        features = StudentFeatures(*batch.spread(outputs[0].float(), outputs[1].float()), outputs[2])
        terms: dict[str, torch.Tensor] = self.model.objective(features, batch, self.world)
        # Ranks hold parts of a sum, and gradients are averaged over ranks: hence the factor.
        (self.model.objective.total(terms) * self.world.size).backward()  # type: ignore[no-untyped-call]
        return {name: term.detach() for name, term in terms.items()}

    def _forward(self, piece: Piece, towers: nn.Module | None = None) -> Outputs:
        device = self.world.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return (towers or self.called)(*piece)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the batch's statistics without noting them: the second pass does."""
    momenta = [(norm, norm.momentum) for norm in batch_norms(module)]
    for norm, _ in momenta:
        norm.momentum = 0.0
    yield
    for norm, momentum in momenta:
        norm.momentum = momentum


@dataclass(frozen=True)
class Arithmetic:
    """Of a run. sample_flops: operations of a step for a mean row, two for a multiply-add, of the towers alone. ranks:
    devices that share the rows. peak: TFLOP/s of one of them; 0.0 where it is not known."""

    sample_flops: float
    ranks: int
    peak: float

    def rates(self, samples_per_second: float) -> dict[str, float]:
        """Return achieved TFLOP/s of a device, and its share of the peak (model FLOPs utilization) where that is known:
        a peak below what was achieved was measured on a busy machine."""
        tflops = samples_per_second * self.sample_flops / self.ranks / 1e12
        return {"tflops": tflops} | ({"mfu": tflops / self.peak} if self.peak >= tflops else {})


@torch.no_grad()
def count_arithmetic(
    towers: Towers, context: int, ranks: int, *, half: bool, images: float = 1.0, texts: float = 1.0
) -> Arithmetic:
    """Count the forward pass of a row whose caption fills the context, `images` and `texts` being the shares of rows
    with each; backward takes twice as much for towers that learn. What a step computes twice (GradCache, checkpointing)
    counts once."""
    device = towers.mean.device
    image = torch.zeros(1, 3, *image_size(towers.student), dtype=torch.uint8, device=device)
    tokens = torch.ones(1, context, dtype=torch.long, device=device)
    training, fast = towers.training, torch.backends.mha.get_fastpath_enabled()
    learned = {name for name, parameter in towers.student.named_parameters() if parameter.requires_grad}
    towers.eval().requires_grad_(False)  # the counter hooks the gradient of a parameter that a module is called with
    torch.backends.mha.set_fastpath_enabled(False)  # the counter knows neither it nor a CPU's attention
    try:
        total = 0.0
        for encode, inputs, share in ((towers.encode_images, image, images), (towers.encode_tokens, tokens, texts)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                encode(inputs)
            learns = any(name.startswith("visual.") == (inputs is image) for name in learned)
            total += counter.get_total_flops() * (3 if learns else 1) * share
    finally:
        towers.train(training)
        for name, parameter in towers.student.named_parameters():
            parameter.requires_grad_(name in learned)
        torch.backends.mha.set_fastpath_enabled(fast)
    cuda = device.type == "cuda"
    peak, _ = peak_tflops(torch.cuda.get_device_name(device) if cuda else "cpu", half)
    return Arithmetic(total, ranks, peak * (1 if cuda else torch.get_num_threads()))
