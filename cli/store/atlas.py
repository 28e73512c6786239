"""`mmkd store atlas`: hand rows to embedding-atlas."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.base.errors import UserError
from mmkd.base.install import install_command
from mmkd.base.text import counted
from mmkd.cli.params import STORE
from mmkd.cli.store.group import store
from mmkd.cli.store.stats import sample_rows

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath
    from mmkd.store.inspect.projection import Method


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.option("--teacher", required=True, help="Name in the store, whose space is drawn.")
@click.option("--sample", default="100000", show_default=True, help="Rows to draw, or `all`.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option(
    "--projection", type=click.Choice(["pca", "umap"]), default="pca", show_default=True, help="To the plane."
)
@click.option("--out", type=click.Path(path_type=Path), help="Only write the rows, as Parquet.")
def atlas(path: StorePath, teacher: str, sample: str, seed: int, projection: Method, out: Path | None) -> None:
    """Explore rows in embedding-atlas, which serves them on this machine until Ctrl-C."""
    import numpy as np
    import pyarrow.parquet as pq

    from mmkd.base.files import write_atomically
    from mmkd.store import IMAGE_SOUND, FeatureStore
    from mmkd.store.inspect.atlas import X, Y, atlas_table

    program = shutil.which("embedding-atlas")
    if out is None and program is None:
        raise UserError(f"embedding-atlas is not installed: {install_command('atlas')}, or give --out FILE.parquet")
    source = FeatureStore.open(path)
    wanted = sample_rows(sample)
    has_images = bool(np.any(source.valid(teacher) & IMAGE_SOUND))
    table = atlas_table(source, teacher, "image" if has_images else "text", wanted, seed, projection)
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
