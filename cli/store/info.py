"""`mmkd store info`, `verify`, `diff` and `tag`: a store at a glance, each byte of it checked, compared, named."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from shlex import quote

import click

from mmkd.base.places.remote import StorePath, as_root
from mmkd.base.text import bytes_text, counted, seconds_text
from mmkd.cli.params import JSON, SEED, STORE_PATH, echo
from mmkd.store import FeatureStore, VerifyReport
from mmkd.store.inspect.coverage import shard_ranges
from mmkd.store.inspect.findings import Finding, store_findings
from mmkd.store.inspect.info import Activity, StoreInfo, store_info
from mmkd.store.inspect.versions import differences, make_tag, read_tag, store_content, tag_names
from mmkd.store.verify import repair
from mmkd.store.verify import verify as check

REASONS = 10
"""Failure reasons on the screen; `--json` has all."""


@click.command()
@STORE_PATH
@JSON
def info(path: StorePath, as_json: bool) -> None:
    """One screen: rows, failures by reason, a map of shards, seconds, bytes, selections, provenance."""
    found = store_info(FeatureStore.open(path))
    try:
        "█▓░·".encode(sys.stdout.encoding or "ascii")
        ascii_only = False
    except UnicodeEncodeError:
        ascii_only = True
    findings = [asdict(finding) for finding in store_findings(found)]
    echo(as_json, found.as_json() | {"findings": findings}, info_lines(found, ascii_only))


@click.command()
@STORE_PATH
@click.option("--deep", is_flag=True, help="Also decode every feature: finite, not zero, NaN where missing.")
@click.option(
    "--repair", "drop_damaged", is_flag=True, help="Drop what is damaged, so that the next extract redoes it."
)
@click.option("-n", "--sample", type=click.IntRange(min=1), help="Shards to check, drawn at random.  [default: all]")
@SEED
@JSON
def verify(path: StorePath, deep: bool, drop_damaged: bool, sample: int | None, seed: int, as_json: bool) -> None:
    """Compare every byte with the ledger; exit status 1 when something is wrong and was not repaired.

    With -n, only the bytes of some shards are compared; metadata, entries and selections are still checked in full.
    `mmkd teachers compare` says whether features are still what their teacher gives.
    """
    report = check(path, deep, sample, seed)
    done = repair(path, report) if drop_damaged else ()
    after = check(path, deep, sample, seed) if done else report
    content = asdict(report) | {"problems": report.problems, "repaired": done, "sound": after.sound}
    echo(as_json, content, (*report.problems, *done, _verdict(after)))
    if not after.sound:
        sys.exit(1)


@click.command()
@click.argument("one", metavar="A", type=as_root)
@click.argument("other", metavar="B", type=as_root)
@JSON
def diff(one: StorePath, other: StorePath, as_json: bool) -> None:
    """Report in which rows, teachers, shards and selections B differs from A; exit status 1 if it does.

    Cards and ledgers are compared; `mmkd store verify` says whether a store's bytes are what its ledger says.
    """
    found = list(differences(*(store_content(FeatureStore.open(path)) for path in (one, other))))
    echo(as_json, {"equal": not found, "differences": found}, found or ["equal: rows, teachers and selections"])
    sys.exit(1 if found else 0)


@click.command()
@STORE_PATH
@click.argument("name", required=False)
@JSON
def tag(path: StorePath, name: str | None, as_json: bool) -> None:
    """Give what STORE holds now a NAME that never changes; without NAME, list the tags and what changed since.

    A tag is a digest of the rows, the teachers with their ledger entries, and the selections. Without NAME, the exit
    status is 1 if STORE is not what one of its tags says.
    """
    store = FeatureStore.open(path)
    if name is not None:
        made = make_tag(store, name)
        echo(as_json, made.model_dump(mode="json"), [f"{made.name}  {made.created}  digest {made.digest}"])
        return
    tags = [read_tag(path, each) for each in tag_names(path)]
    content = store_content(store) if tags else None
    changes = {each.name: each.changes(content) for each in tags} if content else {}
    lines = [
        f"{each.name}  {each.created}  digest {each.digest[:16]}  {'; '.join(changes[each.name]) or 'unchanged'}"
        for each in tags
    ]
    facts = [each.model_dump(mode="json") | {"changes": changes[each.name]} for each in tags]
    echo(as_json, facts, lines or ["no tags"])
    sys.exit(1 if any(changes.values()) else 0)


def _verdict(report: VerifyReport) -> str:
    depth = "bytes and values" if report.deep else "bytes"
    found = counted(len(report.problems), "problem")
    verdict = "sound" if report.sound else f"{found}; `--repair` drops what is damaged"
    temporary, orphans = counted(len(report.temporary), "temporary file"), counted(len(report.orphans), "file")
    left = f"{temporary} and {orphans} without an entry left over"
    some = report.shards < report.all_shards
    share = f" ({report.shards:,} of {counted(report.all_shards, 'shard')}, drawn at random)" if some else ""
    return f"{verdict}: {depth} of {counted(report.entries, 'ledger entry')} checked{share}, {left}"


def info_lines(info: StoreInfo, ascii_only: bool = False) -> Iterator[str]:
    """Yield one screen about a store."""
    summary = info.summary
    status = ", ".join(f"{count:,} {name}" for name, count in summary.status.items())
    versions = ", ".join(f"{name} {version}" for name, version in info.record.versions.items())
    yield summary.root
    yield f"corpus    {summary.corpus} ({info.record.corpus.kind}), indexed {summary.created}"
    yield f"made by   {versions}"
    status += f"; of these {info.record.linked}" if info.record.linked else ""
    yield f"rows      {summary.rows:,} ({status}) in {counted(summary.shards, 'shard')} of {summary.rows_per_shard:,}"
    bytes_in_all = summary.sample_bytes + sum(teacher.bytes for teacher in summary.teachers.values())
    yield f"bytes     {bytes_text(bytes_in_all)}, {bytes_text(summary.sample_bytes)} of them samples"
    if summary.reasons:
        yield f"failures  {counted(sum(summary.reasons.values()), 'row')}"
    yield from (f"  {count:,} x {reason}" for reason, count in list(summary.reasons.items())[:REASONS])
    if len(summary.reasons) > REASONS:
        yield f"  and {counted(len(summary.reasons) - REASONS, 'more reason')}; --json has all"
    yield f"teachers  {len(summary.teachers)}"
    if summary.teachers:
        yield from _teacher_lines(info, ascii_only)
    for selection in info.selections:
        yield f"selection {selection.name}: {selection.kept:,} of {counted(selection.available, 'pair')} kept"
    yield from _activity_lines(info.activity, summary.complete)
    yield from finding_lines(store_findings(info))
    yield f"features were not read; next: mmkd store stats {quote(summary.root)}"


def _teacher_lines(info: StoreInfo, ascii_only: bool) -> Iterator[str]:
    """Yield a line about each teacher, then the map of its shards."""
    summary = info.summary
    width = max(map(len, summary.teachers))
    for slug, teacher in summary.teachers.items():
        card = info.cards[slug]
        yield (
            f"  {slug:{width}}  {teacher.shards_done}/{counted(teacher.shards_asked, 'shard')}  "
            f"{'  '.join(counted(rows, tower) for tower, rows in teacher.rows.items())}  "
            f"{card.dim} x {card.encoding}  {bytes_text(teacher.bytes)}  "
            f"digest {teacher.digest}  {card.source}"
        )
    if not summary.shards:
        return
    legend = "# sound  + most of it  - less  . missing" if ascii_only else "█ sound  ▓ most of it  ░ less  · missing"
    yield f"shards    {f'0 to {summary.shards - 1}' if summary.shards > 1 else '0'}: {legend}"
    for slug in summary.teachers:
        missing = f"  lacks {shard_ranges(holes)}" if (holes := info.coverage.holes(slug)) else ""
        yield f"  {slug:{width}}  {info.coverage.line(slug, ascii_only=ascii_only)}{missing}"


def _activity_lines(activity: Activity, complete: bool) -> Iterator[str]:
    if activity.seconds:
        shared = [f"{name} {seconds_text(activity.seconds[name])}" for name in activity.seconds if " " not in name]
        phases = ", ".join(shared) or "forward passes only"
        yield f"seconds   summed over workers, {counted(activity.runs, 'run')}: {phases}"
        for slug, towers in activity.by_teacher().items():
            rates = {tower: activity.tflops.get(f"{tower} {slug}") for tower in towers}
            yield f"  {slug}: " + ", ".join(
                f"{tower} {seconds_text(spent)}" + (f" ({rates[tower]:.3g} TFLOP/s)" if rates[tower] else "")
                for tower, spent in towers.items()
            )
    if activity.last_write is not None and activity.seconds_ago is not None:
        ago = seconds_text(activity.seconds_ago)
        running = "; a run is probably in progress" if activity.running else ""
        yield f"written   {activity.last_write}, {ago} ago{running}"
    if not complete and not activity.running:
        yield "not complete: run the same `mmkd extract` command again to continue"


def finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield findings, faults first."""
    for finding in sorted(findings, key=lambda finding: finding.severity):
        yield f"{finding.severity:7}  {finding.text}"
        yield f"         see: {finding.command}"
