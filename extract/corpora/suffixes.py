"""Suffixes of files, lower-case and with their dot: by them a corpus' kind is known, and its files are found."""

from __future__ import annotations

TABLES = (".csv", ".tsv", ".jsonl")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2")
"""In the order in which the image of a tar's sample is chosen among several."""
DICOM = (".dcm", ".dicom", ".ima")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
"""Without TIFF, which is a picture until `kind: slides` says otherwise."""
