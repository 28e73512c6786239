"""`mmkd store report` and `mmkd store atlas`: a page that opens offline, and rows for embedding-atlas."""

import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from mmkd.base.errors import UserError
from mmkd.base.files import write_atomically
from mmkd.base.install import install_command
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.cli.params import ANY_PATH, JSON, SAMPLE, SEED, STORE_PATH, TEACHERS, Names, echo
from mmkd.cli.store.info import finding_lines
from mmkd.store import FeatureStore
from mmkd.store.inspect.projection import Method, X, Y, atlas_table

PROJECTION = click.option("--projection", type=click.Choice(["pca", "umap"]), default="pca", help="Method of the map.")


@click.command()
@STORE_PATH
@click.argument("out", metavar="OUT.html", type=ANY_PATH)
@TEACHERS
@SAMPLE(default="8192")
@SEED
@PROJECTION
@JSON
def report(
    path: StorePath, out: Path, teachers: Names, sample: int | None, seed: int, projection: Method, as_json: bool
) -> None:
    """Write one self-contained page: coverage, distributions, agreement, a map, odd rows and failures."""
    from mmkd.store.report.content import Options
    from mmkd.store.report.page import write_report

    say = None if as_json else lambda step: click.echo(f"{step} ...", err=True)
    content = write_report(FeatureStore.open(path), out, Options(teachers, sample, seed, projection), say)
    size = out.stat().st_size
    findings = [asdict(finding) for finding in content.findings]
    odd = [asdict(outlier) for outlier in content.outliers]
    facts = {"page": str(out), "bytes": size, "findings": findings, "odd_rows": odd}
    first = f"{out}: {size / 1e6:.1f} MB, opens in any browser, needs no network"
    echo(as_json, facts, (first, *finding_lines(content.findings)))


@click.command()
@STORE_PATH
@click.option("--teacher", required=True, help="Teacher whose space is drawn.")
@SAMPLE(default="100000")
@SEED
@PROJECTION
@click.option("--out", type=ANY_PATH, help="Only write the rows to this Parquet file.")
def atlas(path: StorePath, teacher: str, sample: int | None, seed: int, projection: Method, out: Path | None) -> None:
    """Explore rows in embedding-atlas, which serves them on this machine until Ctrl-C."""
    program = shutil.which("embedding-atlas")
    if out is None and program is None:
        raise UserError(f"embedding-atlas is not installed: {install_command('atlas')}, or give --out FILE.parquet")
    source = FeatureStore.open(path)
    valid, bits = source.valid(teacher), source.card(teacher).sound_bits
    tower = next((tower for tower, bit in bits.items() if np.any(valid & bit)), next(iter(bits)))
    table = atlas_table(source, teacher, tower, sample, seed, projection)
    if out is not None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(out, buffer.getvalue())
        click.echo(f"{counted(table.num_rows, 'row')} in {out}; embedding-atlas {out} --x {X} --y {Y} --text caption")
        return
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="mmkd-atlas-") as folder:
        rows = Path(folder) / "rows.parquet"
        pq.write_table(table, rows)
        command = [program, str(rows), "--x", X, "--y", Y, "--text", "caption", "--host", "localhost"]
        sys.exit(subprocess.run(command, check=False).returncode)  # noqa: S603 - the program that was asked for
