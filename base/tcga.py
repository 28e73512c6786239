"""Barcodes of The Cancer Genome Atlas, which name slides of public sets."""

import re

# Project, site, participant.
_BARCODE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:-|$)", re.IGNORECASE)


def tcga_patient(slide: str) -> str | None:
    """Return the patient in a slide's name, in capitals; None if the name is not a TCGA barcode."""
    found = _BARCODE.match(slide)
    return found.group(1).upper() if found else None
