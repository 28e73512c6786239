"""Suffixes of files, in lower case and with their dot: they decide a corpus' kind and which of its files are read."""

from __future__ import annotations

TABLES = (".csv", ".tsv", ".jsonl")
PICTURES = (
    *(
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".jp2",
        ".jfif",
        ".jpe",
        ".avif",
        ".heic",
        ".heif",
    ),
    *(".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""In the order in which one of several images of a sample is chosen. Those that Pillow cannot decode fail their row."""
DICOM = (".dcm", ".dicom", ".ima")
TEXTS = (".txt", ".caption", ".json")
"""Captions beside an image, in the order in which one is chosen."""
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
"""Without TIFF, which is a picture unless `kind: slides` says otherwise."""
