"""The folder in which the documents' snippets run: a small corpus, tiny teachers behind their published names, stores.

The teachers lie in a hub cache of its own in the formats that they are published in, so a snippet says
`--teachers biomedclip,plip` as its readers will; only the sizes differ.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from in_process import load, run
from tiny_corpus import png, write_tar_corpus
from tiny_teachers import TINY, write_tiny_teacher

from mmkd.store import FeatureStore
from mmkd.store.convert.original_export import export_original

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLASSES = ("adenoma", "benign", "carcinoma")
MODALITIES = ("pathology", "CT", "MRI")
COLUMNS = ("filename", "title", "id", "modality", "patient", "split", "class", "domain")

SUITE = """
suite: specimens
version: 1
store: eval-features
models: [biomedclip, plip, student]
bootstrap: {n: 100}
datasets:
  - {dataset: specimens, version: 1, role: report, label: class, group: patient, domain: domain,
     rows: {val: {split: val}, test: {split: test}}, prompts: {rows: {split: prompt}, label: class}, tasks: [zero_shot]}
"""


def write_hub(root: Path) -> None:
    """BiomedCLIP, PLIP and QuiltNet as a download leaves them, in their formats and at a thousandth of their sizes."""
    from mmkd.extract.teachers.published import the_nine
    from tests import teacher_snapshots as snapshots

    writers = {"biomedclip": snapshots.biomedclip, "plip": snapshots.plip, "quiltnet": snapshots.quiltnet}
    for teacher in the_nine():
        if teacher.slug in writers:
            revision = teacher.revision or "main"
            repository = root / f"models--{teacher.source.removeprefix('hf-hub:').replace('/', '--')}"
            snapshot = repository / "snapshots" / COMMIT
            snapshot.mkdir(parents=True)
            (repository / "refs").mkdir()
            (repository / "refs" / revision).write_text(COMMIT)
            writers[teacher.slug](snapshot)


def write_tables(folder: Path) -> None:
    """pairs.csv (300 pairs), more.csv (40 others) and eval.csv (90 pairs and two prompts a class), over figures/."""
    (folder / "figures").mkdir(parents=True)
    splits = {"pairs": ["train"] * 240 + ["val"] * 60, "more": ["train"] * 40, "eval": ["val"] * 30 + ["test"] * 60}
    for table, rows in splits.items():
        with (folder / f"{table}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for i, split in enumerate(rows):
                name = f"{table}_{i:06d}" if table != "pairs" else f"figure_{i:06d}"
                (folder / "figures" / f"{name}.png").write_bytes(png(i + 1000 * len(table)))
                of_class, modality = CLASSES[i % 3], MODALITIES[i // 3 % 3]
                title = f"{modality} of {of_class}, specimen {i}"
                organ = ("colon", "lung")[i % 2]
                writer.writerow([f"figures/{name}.png", title, name, modality, f"p{i // 2}", split, of_class, organ])
            if table == "eval":
                for i, of_class in enumerate(CLASSES * 2):
                    prompt = f"a picture of {of_class} ({i})"
                    writer.writerow(["", prompt, f"prompt_{i}", "", "", "prompt", of_class, ""])


def write_other_corpora(root: Path) -> None:
    """data/ (Parquet with images in its cells), shards/ (tars), studies/ (DICOM) and slides/ with its table."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pydicom.data import get_testdata_file

    write_tar_corpus(root / "shards", 20, per_tar=10)
    for name in ("data", "studies", "slides"):
        (root / name).mkdir()
    cells = pa.table({"image": [png(i) for i in range(12)], "caption": [f"finding {i}" for i in range(12)]})
    pq.write_table(cells, root / "data" / "pairs.parquet")
    shutil.copy(str(get_testdata_file("CT_small.dcm")), root / "studies" / "study.dcm")
    (root / "slides.csv").write_text("slide,patient\na,p1\n")
    (root / "SLAKE" / "imgs").mkdir(parents=True)
    question = {"qid": 1, "q_lang": "en", "img_name": "a.png", "question": "Is it CT?", "answer": "no"}
    (root / "SLAKE" / "train.json").write_text(json.dumps([question]))
    (root / "SLAKE" / "imgs" / "a.png").write_bytes(png(1))
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (root / name).touch()


def write_scene(root: Path, hub: Path) -> None:
    """Tables, models/mine and models/clip, student, tiny-student.json; features and eval-features of the first two."""
    write_tables(root)
    write_other_corpora(root)
    for seed, name in enumerate(("models/mine", "models/clip", "student")):
        write_tiny_teacher(root / name, seed=seed + 5)
    small = TINY | {"embed_dim": 20, "text_cfg": TINY["text_cfg"] | {"width": 16}}
    (root / "tiny-student.json").write_text(json.dumps(small))
    folders = {path.parent.parent.name.split("--")[-1]: path for path in hub.glob("models--*/snapshots/*")}
    places = {
        "biomedclip": folders["BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"],
        "plip": folders["plip"],
        "student": root / "student",
    }
    teachers = load(places, *places)
    run(root / "pairs.csv", root / "features", {name: teachers[name] for name in ("biomedclip", "plip")})
    run(root / "eval.csv", root / "eval-features", teachers)
    # A page makes its own by exporting; eval-features keeps what this one said.
    shutil.rmtree(root / "student")
    (root / "suite.yaml").write_text(SUITE)
    # The release keeps its images in its own folder; an export leaves them where the corpus has them.
    export_original(FeatureStore.open(root / "features"), root / "MMKDCLIP_DATA", allow_loss=["all"])
    shutil.copytree(root / "figures", root / "MMKDCLIP_DATA" / "figures")
