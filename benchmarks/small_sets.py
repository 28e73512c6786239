"""Public sets of small medical images in the demo's layout: another corpus for `ablation.py` and `students.py`.

    mmkd demo DEMO                                            once: five of its teachers are used
    python -P benchmarks/small_sets.py DATA DEMO OUT          writes what those two scripts read
    python -P benchmarks/ablation.py OUT RUNS --table docs/ablation-small-sets.md

DATA holds medical_mnist_small.npz (six classes, 160 training and 60 test images of 64 pixels) and breastmnist.npz
(BreastMNIST, 28 pixels, official splits). A class has six captions for training and three prompts of other wording.
Nine teachers: specialists for CT, body MRI, radiographs and ultrasound, made from the training images as the demo makes
its own, and five of the demo's own that are at home on none of the images (fundus, histology, nuclear, two for brains).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmkd.demo.corpus import COLUMNS
from mmkd.demo.run import STUDENT_MODEL
from mmkd.demo.specialists import train_specialists
from mmkd.extract.config import ExtractConfig
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers

# Class, domain (a specialist of the demo is at home there), modality, captions, prompts.
Class = tuple[str, str, str, tuple[str, ...], tuple[str, ...]]
MEDICAL_MNIST: tuple[Class, ...] = (
    ("abdomen-ct", "ct", "CT",
     ("axial CT of the abdomen", "abdominal CT, liver and bowel", "computed tomography of the upper abdomen",
      "CT slice at the level of the kidneys", "abdominal computed tomography, soft tissue", "CT of abdominal organs"),
     ("CAT scan of the belly", "tomogram of the viscera below the diaphragm", "CT through the abdominal cavity")),
    ("breast-mri", "body-mri", "MRI",
     ("axial MRI of the breast", "breast MR image, both breasts", "magnetic resonance imaging of the breast",
      "MRI slice of the breasts and chest wall", "contrast-enhanced breast MRI", "MR image of mammary tissue"),
     ("magnetic resonance picture of the mammary glands", "MR tomogram of the breasts", "breast scan by MRI")),
    ("chest-xray", "radiograph", "radiography",
     ("frontal chest radiograph", "chest X-ray of lungs and heart", "plain film of the thorax",
      "posteroanterior radiograph of the chest", "X-ray of the lungs and ribs", "chest radiography, frontal view"),
     ("roentgenogram of the thorax", "X-ray picture of both lungs", "a PA film of the rib cage")),
    ("chest-ct", "ct", "CT",
     ("axial CT of the chest", "chest CT, lungs and mediastinum", "computed tomography of the thorax",
      "CT slice through the lungs", "thoracic computed tomography", "CT of the lungs and heart"),
     ("CAT scan of the thorax", "tomogram of the lungs", "CT through the thoracic cavity")),
    ("hand-xray", "radiograph", "radiography",
     ("radiograph of the hand", "X-ray of the bones of the hand", "hand X-ray, fingers and wrist",
      "plain film of a hand", "radiography of the hand, posteroanterior view", "X-ray of carpal bones and fingers"),
     ("roentgenogram of the fingers", "X-ray picture of metacarpals and phalanges", "a film of hand bones")),
    ("head-ct", "ct", "CT",
     ("axial CT of the head", "head CT, skull and brain", "computed tomography of the brain",
      "CT slice of the skull and brain", "non-contrast head computed tomography", "CT of the brain without contrast"),
     ("CAT scan of the cranium", "tomogram of the cerebrum inside the skull", "CT through the head")),
)  # fmt: skip
BREAST: tuple[Class, ...] = (
    ("breast-ultrasound-malignant", "ultrasound", "ultrasound",
     ("breast ultrasound, malignant lesion", "ultrasound of breast cancer", "sonogram of a malignant breast tumour",
      "B-mode image of a carcinoma of the breast", "malignant mass in breast ultrasound", "breast carcinoma, sonogram"),
     ("sonography of a cancer of the breast", "ultrasonic picture of a malignant breast nodule",
      "suspicious breast mass seen with ultrasound")),
    ("breast-ultrasound-benign", "ultrasound", "ultrasound",
     ("breast ultrasound, normal or benign", "ultrasound of a healthy breast", "sonogram of a benign breast lesion",
      "B-mode image of benign breast tissue", "benign finding in breast ultrasound", "normal breast, sonogram"),
     ("sonography of a breast without cancer", "ultrasonic picture of a harmless breast nodule",
      "unremarkable breast seen with ultrasound")),
)  # fmt: skip
SETS = {"medical_mnist_small": MEDICAL_MNIST, "breastmnist": BREAST}


def images(data: Path, split: str) -> Iterator[tuple[str, Class, npt.NDArray[np.uint8]]]:
    """Key, class and grey pixels uint8 (H, W) of every image of a split, in the files' order."""
    for name, classes in SETS.items():
        with np.load(data / f"{name}.npz") as arrays:
            pictures, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].reshape(-1)
        for number, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
            yield f"{name}-{split}-{number:04d}", classes[int(label)], pixels


def write_corpus(data: Path, folder: Path, split: str) -> None:
    """One caption table and its images; a class's captions take turns."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, seen = [], dict.fromkeys((name for classes in SETS.values() for name, *_ in classes), 0)
    for key, (name, domain, modality, captions, prompts), pixels in images(data, split):
        words = captions if split == "train" else prompts
        Image.fromarray(pixels).save(folder / "images" / f"{key}.png")
        rows.append((key, f"images/{key}.png", words[seen[name] % len(words)], modality, domain, name, split))
        seen[name] += 1
    if split == "test":
        for classes in SETS.values():
            for name, domain, modality, _, prompts in classes:
                rows += [(f"prompt-{name}-{i}", "", text, modality, domain, name, "prompt")
                         for i, text in enumerate(prompts)]  # fmt: skip
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def main() -> None:
    """Write the corpora, make four teachers, extract with nine."""
    data, demo, out = (Path(argument) for argument in sys.argv[1:4])
    stores = {"features": out / "corpus" / "train", "eval-features": out / "corpus" / "eval"}
    for split, folder in zip(("train", "test"), stores.values(), strict=True):
        write_corpus(data, folder, split)
    folders = {folder.name: folder for folder in sorted((demo / "teachers").glob("*-specialist"))}
    made = train_specialists(stores["features"] / "captions.csv", out / "teachers")
    folders |= {folder.name: folder for folder in made}
    teachers = ",".join(f"{name}=local-dir:{folder}" for name, folder in folders.items())
    for store, folder in stores.items():
        extract(ExtractConfig(corpus=str(folder), store=out / store, teachers=tuple(parse_teachers(teachers))))
    (out / "student-model.json").write_text(json.dumps(STUDENT_MODEL, indent=1))


if __name__ == "__main__":
    main()
