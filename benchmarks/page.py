"""docs/benchmarks.md out of results: a table for each script, what was to be reached, and where it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from mmkd.benchmarks.result import Row
from mmkd.benchmarks.where import Machine

HEAD = (
    "# Benchmarks\n\nWritten by `make bench`, not by hand. Ratios are of one run: both sides measured in turn, on one "
    "machine. A ratio travels to other machines better than seconds do,\nand no figure here is a test. "
    "Goals are marked met or **missed**. What each script does is told at its head in `benchmarks/`.\n"
)


class Result(BaseModel):
    """What one script found, and where and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    about: str  # docstring of the script; its first paragraph goes to the page
    date: str
    seconds: float
    full: bool
    machine: Machine
    rows: tuple[Row, ...]


def figure(value: float | None) -> str:
    """Three digits that mean something, thousands marked; nothing where there is no figure."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.3g}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| what | against | measured | reference | ratio | goal | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        measured, reference = (
            f"{figure(given)} {row.unit}".strip() if given is not None else "" for given in (row.value, row.reference)
        )
        goal = f"{row.goal}: {'met' if row.met() else '**missed**'}" if row.goal else ""
        cells = (row.what, row.against, measured, reference, figure(row.ratio), goal, row.note)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(result: Result) -> Iterator[str]:
    """Heading, what it is about, tables."""
    heading = " ".join(result.about.partition("\n\n")[0].split())
    size = "the size of a real machine" if result.full else "the size for two cores"
    yield f"## `{result.name}`"
    yield f"{heading}\n"
    yield f"{result.date}, at {size}, {result.seconds / 60:.1f} minutes.\n"
    cpu, gpu = ([row for row in result.rows if row.device == device] for device in ("cpu", "gpu"))
    if cpu:
        yield from table(cpu)
    if gpu:
        yield f"\nOn {result.machine.gpus[0] if result.machine.gpus else 'a GPU'}:\n"
        yield from table(gpu)
    yield ""


def machine_lines(machine: Machine) -> Iterator[str]:
    """Where: machine, versions, peers."""
    gpus = ", ".join(machine.gpus) or "no GPU: nothing on this page was measured on one"
    yield f"- {machine.processor}, {machine.cores} cores, {machine.memory_gb} GB of memory; {machine.system}"
    yield f"- GPU: {gpus}"
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    if machine.peers:
        yield "- others, in environments of their own: " + ", ".join(f"{n} {v}" for n, v in machine.peers.items())


def render(results: Sequence[Result], names: Sequence[str]) -> str:
    """The page: results of the newest one's machine and versions, in the order of `names`; what is missing is said."""
    newest = max(results, key=lambda result: result.date)
    here = {result.name: result for result in results if result.machine.same(newest.machine)}
    missing = [name for name in names if name not in here]
    peers = {name: version for result in here.values() for name, version in result.machine.peers.items()}
    lines = [HEAD, "## Where", *machine_lines(newest.machine.model_copy(update={"peers": peers}))]
    if missing:
        lines.append("- not measured here: " + ", ".join(f"`{name}`" for name in missing))
    lines.append("")
    for name in names:
        if name in here:
            lines += section(here[name])
    return "\n".join(lines).rstrip() + "\n"
