"""A prepared run: its parts, what is said of them before the first step, and its files."""

from dataclasses import dataclass

from mmkd.base.files import temporary_files, write_atomically
from mmkd.base.text import counted
from mmkd.distill import checkpoint
from mmkd.distill.batches import Batches, Schedule
from mmkd.distill.captions import Tokenize
from mmkd.distill.checkpoint import Progress
from mmkd.distill.config import RunConfig
from mmkd.distill.monitor import Monitor
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.provenance import TEXT, RunRecord
from mmkd.distill.student import save_text
from mmkd.distill.train_step import Arithmetic, Updater
from mmkd.distill.world import World


@dataclass
class Run:
    """Everything the training loop needs."""

    config: RunConfig
    world: World
    batches: Batches
    update: Updater
    average: WeightAverage | None
    monitor: Monitor
    record: RunRecord
    progress: Progress
    tokenizer: Tokenize
    arithmetic: Arithmetic
    judge_before: str = ""
    """Judge of the run so far, when another metric or other rows choose the best from here on."""

    @property
    def schedule(self) -> Schedule:
        """Steps of the whole run."""
        return self.batches.plan.schedule

    @property
    def parameters(self) -> int:
        """Number of parameters of the student alone."""
        return sum(parameter.numel() for parameter in self.update.model.towers.parameters())

    @property
    def headline(self) -> str:
        """One line: pairs, teachers, student, steps and devices."""
        teachers, pairs, judge = self.batches.teachers, self.batches.pairs, self.judge_before
        rows = ", ".join(counted(count, name) for name, count in pairs.counts.items())
        if (choices := self.batches.choices) is not None:
            rows += f", {counted(len(choices.choice_rows), 'caption')}"
        return (
            f"{rows}, {counted(len(teachers.slugs) if teachers else 0, 'teacher')}, "
            f"student of {self.parameters / 1e6:.1f} M parameters, {self.schedule.total_steps:,} steps of "
            f"{self.config.batch_size} on {self.world.size} x {self.world.device.type}"
            + (f", from step {self.progress.step:,}" if self.progress.step else "")
            + (f"; the best checkpoint is chosen from here on, it was judged by {judge}" if judge else "")
        )

    def notes(self) -> list[str]:
        """List warnings: truncated captions, teachers without pairs, parts of the student that are not trained."""
        found = []
        pairs = self.batches.pairs
        if pairs.cut:
            share, context = pairs.cut / (len(pairs.rows) - pairs.counts.get("lone image", 0)), pairs.captions.context
            found.append(f"{share:.1%} of the captions fill the context of {context} tokens and may be cut there")
        if silent := [slug for slug, count in pairs.taught.items() if not count]:
            found.append(f"no row of this run has features of {', '.join(silent)}")
        if self.config.data.unpaired and pairs.all_paired:
            found.append("data.unpaired changes nothing: every row of this run is a pair")
        student = self.update.model.towers.student
        if getattr(student, "logit_bias", None) is not None:
            found.append("the student's logit_bias is not trained: no loss here uses it")
        if hasattr(student, "text_decoder"):
            found.append("the student's text decoder is not trained: no loss here uses it")
        return found

    def begin(self) -> None:
        """Write the configuration, in the first rank, and delete what killed runs left. Raises StoreError as `save`."""
        if self.world.first:
            out = self.config.out
            cache = (self.config.data.cache or out / "cache").resolve()
            for leftover in temporary_files(out):
                if leftover.parent.resolve() != cache:  # other runs fetch into it too
                    leftover.unlink(missing_ok=True)
            write_atomically(out / checkpoint.CONFIG, self.config.model_dump_json(indent=1).encode())
            save_text(self.update.model.towers.student, self.tokenizer, out / TEXT)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, in the first rank. Raises StoreError if the disk is full or read-only."""
        if self.world.first:
            out, keep, update = self.config.out, self.config.checkpoints.keep_last, self.update
            checkpoint.save_checkpoint(out, keep, self.record, progress, update.model, update.optimizer, self.average)
