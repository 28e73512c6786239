"""Small corpora of made-up pictures: a folder with a table, and the same as WebDataset tars."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(seed: int) -> bytes:
    """The picture's bytes as PNG."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_table_corpus(folder: Path, rows: int) -> Path:
    """`rows` PNG files and pairs.csv with key, image, caption, modality, site; returns the table."""
    (folder / "images").mkdir(parents=True)
    table = folder / "pairs.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "image", "caption", "modality", "site"])
        for i in range(rows):
            (folder / "images" / f"{i}.png").write_bytes(png(i))
            writer.writerow([f"k{i}", f"images/{i}.png", f"finding {i % 37} seen in plane {i % 5}", "CT", f"s{i % 3}"])
    return table


def write_tar_corpus(folder: Path, rows: int, per_tar: int) -> Path:
    """The same inputs as tars of `per_tar` samples: `k0.png` beside `k0.txt`."""
    folder.mkdir(parents=True)
    for start in range(0, rows, per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w") as tar:
            for i in range(start, min(start + per_tar, rows)):
                for name, data in ((f"k{i}.png", png(i)), (f"k{i}.txt", f"finding {i % 37}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder
