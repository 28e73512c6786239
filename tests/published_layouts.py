"""Miniatures of public data sets, each with the folders, file names, columns and codes of its release, among them the
files that a description must leave out. They are written down from the releases, not from the descriptions.

A path with `{a,b}` or `{1..3}` stands for several. Pictures are one byte long, as listing a corpus decodes none.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_corpus import png

Counts = dict[str, dict[str, int]]
"""Split to class to rows; `all` of a set whose splits are drawn. Without classes: `rows`, or `groups` of slides."""
Content = str | bytes | Callable[[Path], object]


@dataclass(frozen=True)
class Layout:
    """Pictures, other files, and what a check must find."""

    pictures: tuple[str, ...]
    others: dict[str, Content] = field(default_factory=dict)
    finds: Counts = field(default_factory=dict)


def paths(pattern: str) -> list[str]:
    """The paths that a pattern stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices: list[Iterable[str]] = []
    for i, part in enumerate(parts):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        choices.append(
            map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else part.split(",") if i % 2 else [part]
        )
    return ["".join(one) for one in itertools.product(*choices)]


def build(layout: Layout, data: Path) -> None:
    """Write a miniature below the folder that `${data}` names."""
    for name in itertools.chain.from_iterable(map(paths, layout.pictures)):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"x")
    for pattern, content in layout.others.items():
        for name in paths(pattern):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(data / name)
            else:
                (data / name).write_bytes(content.encode() if isinstance(content, str) else content)


def lines(header: str, rows: Iterable[str], end: str = "\n") -> str:
    """A table."""
    return end.join((header, *rows)) + end


def each(counts: int, *classes: str) -> dict[str, int]:
    """So many rows of each class."""
    return dict.fromkeys(classes, counts)


def medmnist(classes: int, shape: tuple[int, ...] = (28, 28), labels: int = 1) -> Content:
    """MedMNIST's `.npz`: two pictures of each class in every split; of several labels, one set in each picture."""

    def write(path: Path) -> None:
        arrays: dict[str, Any] = {}
        for split in ("train", "val", "test"):
            codes = np.repeat(np.arange(classes, dtype=np.uint8), 2)
            arrays[f"{split}_images"] = np.zeros((len(codes), *shape), dtype=np.uint8)
            arrays[f"{split}_labels"] = codes[:, None] if labels == 1 else np.eye(labels, dtype=np.uint8)[codes]
        np.savez_compressed(path, **arrays)

    return write


def mnist(name: str, *classes: str, shape: tuple[int, ...] = (28, 28)) -> Layout:
    return Layout(
        (),
        {f"medmnist/{name}.npz": medmnist(len(classes), shape)},
        {split: each(2, *classes) for split in ("train", "val", "test")},
    )


@functools.cache
def slide() -> bytes:
    """A tiled TIFF of 512 x 512 pixels at 0.5 micrometers, all tissue: four tiles."""
    import tifffile

    file = io.BytesIO()
    pixels = np.full((512, 512, 3), (200, 120, 170), dtype=np.uint8)
    pixels[:, :, 0] -= np.arange(512, dtype=np.uint8)[:, None] % 3
    tifffile.imwrite(
        file, pixels, tile=(256, 256), photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER"
    )
    return file.getvalue()


def write_slide(path: Path) -> None:
    path.write_bytes(slide())


@functools.cache
def dicom() -> bytes:
    """A chest radiograph's header and four pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Modality, dataset.Rows, dataset.Columns = "CR", 2, 2
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.PixelData = 7, 0, bytes(4)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def parquet(label: str, values: list[Any], **further: list[Any]) -> Content:
    """A shard as Hugging Face's converter writes it."""

    def write(path: Path) -> None:
        images = [{"bytes": png(seed), "path": None} for seed in range(len(values))]
        pq.write_table(pa.table({"image": images, **further, label: values}), path)

    return write


def tcga(cohort: str, code: str, censored: tuple[str, str] = ("0", "1")) -> Layout:
    """Twelve patients with PORPOISE's table, the first with two slides."""
    rows, slides = [], []
    for i in range(12):
        for number in range(1 + (i == 0)):
            name = f"TCGA-3Z-A{i:03}-01Z-00-DX{number + 1}.79F4D1A6-ACDB-4AB1-B8A8-C1CEE617C734.svs"
            rows.append(f"{len(rows)},TCGA-3Z-A{i:03},{name},69,3Z,{12.65 + i},{censored[i % 2]},,{code},1.0")
            slides.append(f"tcga_{cohort}/slides/{name}")
    header = ",case_id,slide_id,age,site,survival_months,censorship,is_female,oncotree_code,train"
    others: dict[str, Content] = {f"tcga_{cohort}/clinical.csv": lines(header, rows)}
    return Layout((), others | dict.fromkeys(slides, write_slide), {"test": {"groups": 12}})


def subtypes() -> Layout:
    """IDC, ILC and a third subtype that is no class; every patient has one slide."""
    rows, others = [], {}
    for i, code in enumerate(["IDC"] * 6 + ["ILC"] * 6 + ["MDLC"]):
        name = f"TCGA-3C-A{i:03}-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291.svs"
        rows.append(f"{i},TCGA-3C-A{i:03},{name},50.0,3C,131.57,1.0,1.0,{code},1.0")
        others[f"tcga_brca/slides/{name}"] = write_slide
    header = ",case_id,slide_id,age,site,survival_months,censorship,is_female,oncotree_code,train"
    found = {"test": each(24, "invasive ductal carcinoma", "invasive lobular carcinoma")}
    return Layout((), {"tcga_brca/clinical.csv": lines(header, rows), **others}, found)


def vqa_rad() -> list[dict[str, Any]]:
    kinds = [("freeform", "CLOSED", "yes"), ("para", "OPEN", "left lung"), ("freeform", "CLOSED ", "no"),
             ("test_freeform", "CLOSED", "no"), ("test_para", "OPEN", "right lung")]  # fmt: skip
    return [
        {
            "qid": i, "phrase_type": phrase, "qid_linked_id": "03f4", "image_case_url": "https://medpix.nlm.nih.gov/case",
            "image_name": f"synpic{i}.jpg", "image_organ": "CHEST", "evaluation": "not evaluated", "question": "Is it?",
            "question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL", "question_type": "PRES",
            "answer": answer, "answer_type": kind,
        }
        for i, (phrase, kind, answer) in enumerate(kinds)
    ]  # fmt: skip


def slake(ids: range) -> str:
    """Each question in English and in Chinese."""
    return json.dumps([
        {
            "img_id": i, "img_name": f"xmlab{i}/source.jpg", "question": question, "answer": answer, "q_lang": language,
            "location": "Abdomen", "modality": "MRI", "answer_type": ("OPEN", "CLOSED")[i % 2], "base_type": "vqa",
            "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 2 * i + (language == "zh"),
        }
        for i in ids
        for language, question, answer in (("en", "Is it?", "Yes"), ("zh", "是吗?", "是"))
    ])  # fmt: skip


GRADES = ("none", "mild", "moderate", "severe", "proliferative")
ORGANS = ("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver", "left lung",
          "right lung", "pancreas", "spleen")  # fmt: skip
TISSUE = ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal mucosa", "stroma",
          "carcinoma")  # fmt: skip
SKIN = ("actinic keratosis", "basal cell carcinoma", "benign keratosis", "dermatofibroma", "melanoma", "naevus",
        "vascular lesion")  # fmt: skip
FINDINGS = ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
            "consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia")  # fmt: skip
CHESTXRAY14 = (*(name.title() for name in FINDINGS[:12]), "Pleural_Thickening", "Hernia")
OCT = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
HYPERKVASIR = {
    "barretts": "Barrett esophagus", "short-segment-barretts": "short segment of Barrett esophagus",
    "oesophagitis-a": "esophagitis grade A", "oesophagitis-b-d": "esophagitis grade B to D", "normal-z-line": "z-line",
    "normal-pylorus": "pylorus", "retroflex-stomach": "retroflexed stomach", "bbps-0-1": "bowel preparation 0 to 1",
    "bbps-2-3": "bowel preparation 2 to 3", "impacted-stool": "impacted stool", "normal-cecum": "cecum",
    "ileum": "ileum", "retroflex-rectum": "retroflexed rectum", "hemorroids": "hemorrhoids", "polyp": "polyp",
    "dyed-lifted-polyps": "dyed lifted polyp", "dyed-resection-margins": "dyed resection margin",
    **{f"ulcerative-colitis-grade-{g}": f"ulcerative colitis grade {g.replace('-', ' to ')}"
       for g in ("0-1", "1", "1-2", "2", "2-3", "3")},
}  # fmt: skip
UPPER = {"barretts", "short-segment-barretts", "oesophagitis-a", "oesophagitis-b-d", "normal-z-line", "normal-pylorus",
         "retroflex-stomach"}  # fmt: skip
GASTROVISION = {
    "Accessory tools": "accessory tools", "Barrett's esophagus": "Barrett esophagus",
    "Blood in lumen": "blood in the lumen", "Cecum": "cecum", "Colon diverticula": "colon diverticula",
    "Colon polyps": "colon polyp", "Colorectal cancer": "colorectal cancer", "Duodenal bulb": "duodenal bulb",
    "Dyed-lifted-polyps": "dyed lifted polyp", "Dyed-resection-margins": "dyed resection margin",
    "Esophagitis": "esophagitis", "Gastric polyps": "gastric polyp",
    "Gastroesophageal_junction_normal z-line": "z-line", "Ileocecal valve": "ileocecal valve",
    "Mucosal inflammation large bowel": "mucosal inflammation", "Normal esophagus": "normal esophagus",
    "Normal mucosa and vascular pattern in the large bowel": "normal large bowel", "Normal stomach": "normal stomach",
    "Pylorus": "pylorus", "Resected polyps": "resected polyp", "Retroflex rectum": "retroflexed rectum",
    "Small bowel_terminal ileum": "terminal ileum",
}  # fmt: skip
DERM7PT = {
    "basal cell carcinoma": "basal cell carcinoma", "blue nevus": "nevus", "clark nevus": "nevus",
    "combined nevus": "nevus", "congenital nevus": "nevus", "dermal nevus": "nevus", "recurrent nevus": "nevus",
    "reed or spitz nevus": "nevus", "dermatofibroma": "miscellaneous", "lentigo": "miscellaneous",
    "melanosis": "miscellaneous", "miscellaneous": "miscellaneous", "vascular lesion": "miscellaneous",
    "melanoma": "melanoma", "melanoma (in situ)": "melanoma", "melanoma (less than 0.76 mm)": "melanoma",
    "melanoma (0.76 to 1.5 mm)": "melanoma", "melanoma (more than 1.5 mm)": "melanoma",
    "melanoma metastasis": "melanoma", "seborrheic keratosis": "seborrheic keratosis",
}  # fmt: skip
MANY = 40
"""Samples of a class where splits are drawn, so that every split gets some."""


def classed(*classes: str) -> list[tuple[int, str]]:
    """Numbers with a class each, for sets whose splits are drawn."""
    return list(enumerate(itertools.chain.from_iterable([name] * MANY for name in classes)))


def _cxr14() -> str:
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    header += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    labels = [*(name for name in CHESTXRAY14 for _ in range(MANY)), *["No Finding"] * 39, "Mass|Hernia"]
    rows = (f"{i:08}_000.png,{name},0,{i},57,M,PA,2682,2749,0.143,0.143" for i, name in enumerate(labels))
    return lines(header, rows)


def _camelyon17() -> Layout:
    # Hospitals 0, 3 and 4 train, 1 validates, 2 tests; split 1 is the validation inside the training hospitals.
    spots = [(center, tumor, split) for center in range(5) for tumor in (0, 1) for split in (0, 1)]
    rows, pictures = [], []
    for i, (center, tumor, split) in enumerate(spots):
        patient, x, y = f"{center * 20 + split:03}", 3328 + 32 * i, 21792
        rows.append(f"{i},{patient},{center},{x},{y},{tumor},{center},{center},{split}")
        folder = f"camelyon17_v1.0/patches/patient_{patient}_node_{center}"
        pictures.append(f"{folder}/patch_patient_{patient}_node_{center}_x_{x}_y_{y}.png")
    table = lines(",patient,node,x_coord,y_coord,tumor,slide,center,split", rows)
    found = {"train": each(3, "normal", "tumor"), "val": each(2, "normal", "tumor"), "test": each(2, "normal", "tumor")}
    return Layout(tuple(pictures), {"camelyon17_v1.0/metadata.csv": table}, found)


def _chexpert() -> str:
    names = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
             "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
             "Fracture", "Support Devices"]  # fmt: skip
    five = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    rows = []
    for i in range(10):
        cells = ",".join("1.0" if name == five[i % 5] else "0.0" for name in names)
        image = f"CheXpert-v1.0-small/train/patient{38614 + i}/study1/view1_frontal.jpg"
        rows.append(f'{i},{image},Male,26,Frontal,AP,{cells},"\n1. bilateral apices, obscured"')
    return lines(",imgpath,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(names) + ",Report Impression", rows)


def _odir() -> str:
    header = "ID,Patient Age,Patient Sex,Left-Fundus,Right-Fundus,Left-Diagnostic Keywords,Right-Diagnostic Keywords,"
    header += "N,D,G,C,A,H,M,O,filepath,labels,target,filename"
    rows = []
    for i, letter in classed(*"NDGCAHMO"):
        place = f"../input/ocular-disease-recognition-odir5k/ODIR-5K/Training Images/{i}_right.jpg"
        target = '"[1, 0, 0, 0, 0, 0, 0, 0]"'
        rows.append(f"{i},69,Female,{i}_left.jpg,{i}_right.jpg,cataract,normal fundus,0,0,0,1,0,0,0,0,"
                    f"{place},['{letter}'],{target},{i}_right.jpg")  # fmt: skip
    return lines(header, rows)


def _listed(folder: str, labels: tuple[str, ...]) -> Layout:
    names = {"lung_aca": "adenocarcinoma", "lung_n": "benign", "lung_scc": "squamous cell carcinoma",
             "colon_aca": "adenocarcinoma", "colon_n": "benign"}  # fmt: skip
    root = f"zeroshotclassification/{folder}"
    lists: dict[str, Content] = {
        f"{root}/{split}.txt": "".join(f"{label}{i}.jpeg {label}\n" for label in labels for i in (1, 2))
        for split in ("train", "val", "test")
    }
    pictures = tuple(f"{root}/{{train,val,test}}/{label}{{1,2}}.jpeg" for label in labels)
    return Layout(pictures, lists, {s: each(2, *(names[label] for label in labels)) for s in ("train", "val", "test")})


LAYOUTS: dict[str, Layout] = {
    "aptos2019": Layout(
        ("aptos2019/train_images/id{0..199}.png", "aptos2019/test_images/id{900..902}.png"),
        {
            "aptos2019/train.csv": lines(
                "id_code,diagnosis", (f"id{i},{grade}" for i, grade in classed("0", "1", "2", "3", "4"))
            ),
            "aptos2019/test.csv": "id_code\nid900\n",
        },
        {"all": each(MANY, *GRADES)},
    ),
    "bach": Layout(
        (
            "ICIAR2018_BACH_Challenge/Photos/Benign/b00{1..2}.tif",
            "ICIAR2018_BACH_Challenge/Photos/InSitu/is00{1..2}.tif",
            "ICIAR2018_BACH_Challenge/Photos/Invasive/iv00{1..2}.tif",
            "ICIAR2018_BACH_Challenge/Photos/Normal/n00{1..2}.tif",
            "ICIAR2018_BACH_Challenge/Photos/thumbnails/b001.png",
        ),
        {"ICIAR2018_BACH_Challenge/Photos/microscopy_ground_truth.csv": "b001.tif,Benign\n"},
        {"test": each(2, "benign", "in situ carcinoma", "invasive carcinoma", "normal")},
    ),
    "bloodmnist": mnist(
        "bloodmnist",
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocyte",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
        shape=(28, 28, 3),
    ),
    "br35h": Layout(
        (
            "br35h/yes/y{0..2}.jpg",
            "br35h/no/no{0..1}.jpg",
            "br35h/pred/pred{0..4}.jpg",
            "br35h/Br35H-Mask-RCNN/TRAIN/y0.jpg",
        ),
        {},
        {"test": {"tumour": 3, "none": 2}},
    ),
    "bracs": Layout(
        (
            "BRACS_RoI/latest_version/{train,val,test}/{0_N,1_PB,2_UDH,3_FEA,4_ADH,5_DCIS,6_IC}/BRACS_{1..2}.png",
            "BRACS_RoI/previous_versions/{train,test}/0_N/BRACS_1.png",
        ),
        {},
        {
            split: each(
                2,
                "normal",
                "pathological benign",
                "usual ductal hyperplasia",
                "flat epithelial atypia",
                "atypical ductal hyperplasia",
                "ductal carcinoma in situ",
                "invasive carcinoma",
            )
            for split in ("train", "val", "test")
        },
    ),
    "brain-mri": Layout(
        (
            "brain_mri/yes/Y{1..3}.jpg",
            "brain_mri/no/{1..2} no.jpeg",
            "brain_mri/brain_tumor_dataset/yes/Y{1..3}.jpg",
            "brain_mri/brain_tumor_dataset/no/{1..2} no.jpeg",
        ),
        {},
        {"test": {"tumour": 3, "none": 2}},
    ),
    "brain-tumor-mri": Layout(
        (
            "brain_tumor_mri/Training/{glioma,meningioma,notumor,pituitary}/Tr-x_00{10..12}.jpg",
            "brain_tumor_mri/Testing/{glioma,meningioma,notumor,pituitary}/Te-x_00{10..11}.jpg",
        ),
        {},
        {
            "train": each(3, "glioma", "meningioma", "none", "pituitary tumour"),
            "test": each(2, "glioma", "meningioma", "none", "pituitary tumour"),
        },
    ),
    "breakhis": Layout(
        (
            "BreaKHis_v1/histology_slides/breast/benign/SOB/{adenosis,fibroadenoma}/SOB_B_A_14-22549AB/{40X,100X,200X,400X}/"
            "SOB_B_A-14-22549AB-0{01,02}.png",
            "BreaKHis_v1/histology_slides/breast/malignant/SOB/{ductal_carcinoma,papillary_carcinoma}/SOB_M_DC_14-2523/"
            "{40X,100X,200X,400X}/SOB_M_DC-14-2523-0{01,02,03}.png",
        ),
        {"BreaKHis_v1/histology_slides/breast/README.txt": "x"},
        {"test": {"benign": 4, "malignant": 6}},
    ),
    "breastmnist": mnist("breastmnist", "malignant", "benign or normal"),
    "bus-bra": Layout(
        ("BUSBRA/Images/bus_{0..79}-l.png", "BUSBRA/Masks/mask_{0..79}-l.png"),
        {
            "BUSBRA/bus_data.csv": lines(
                "ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX",
                (
                    f'bus_{i}-l,{i},Fibroadenoma,{name},2,"GE Logiq 7",350,440,left,"[1,2,3,4]"'
                    for i, name in classed("benign", "malignant")
                ),
            ),
            "BUSBRA/5-fold-cv.csv": "ID,Pathology,kFold\nbus_0-l,benign,1\n",
        },
        {"all": each(MANY, "benign", "malignant")},
    ),
    "busi": Layout(
        (
            "Dataset_BUSI_with_GT/benign/benign ({1..3}){,_mask}.png",
            "Dataset_BUSI_with_GT/benign/benign (1)_mask_1.png",
            "Dataset_BUSI_with_GT/malignant/malignant ({1..2}){,_mask}.png",
            "Dataset_BUSI_with_GT/normal/normal ({1..2}){,_mask}.png",
        ),
        {},
        {"test": {"benign": 3, "malignant": 2, "normal": 2}},
    ),
    "camelyon16": Layout(
        (),
        {
            "CAMELYON16/training/normal/normal_00{1..2}.tif": write_slide,
            "CAMELYON16/training/tumor/tumor_00{1..2}.tif": write_slide,
            "CAMELYON16/testing/images/test_00{1..2}.tif": write_slide,
            "CAMELYON16/testing/evaluation/evaluation_masks/test_002_evaluation_mask.tif": write_slide,
            "CAMELYON16/testing/reference.csv": "test_001,Normal,None,None\ntest_002,Tumor,IDC,Macro\n",
            "CAMELYON16/slides.csv": "slide,diagnosis,split\nnormal_001,normal,train\nnormal_002,normal,train\n"
            "tumor_001,tumor,train\ntumor_002,tumor,train\ntest_001,normal,test\ntest_002,tumor,test\n",
        },
        {"train": {"normal": 8, "tumour": 8}, "test": {"normal": 4, "tumour": 4}},
    ),
    "camelyon17-wilds": _camelyon17(),
    "chest-ctscan": Layout(
        (
            *tuple(
                f"chest_ctscan/Data/{{train,valid}}/{name}/000000 ({{1..2}}).png"
                for name in (
                    "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib",
                    "large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa",
                    "normal",
                    "squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa",
                )
            ),
            "chest_ctscan/Data/test/{adenocarcinoma,large.cell.carcinoma}/000108 ({1..3}).png",
            "chest_ctscan/Data/test/{normal,squamous.cell.carcinoma}/000108 ({1..3}).png",
        ),
        {},
        {
            split: each(
                3 if split == "test" else 2,
                "adenocarcinoma",
                "large cell carcinoma",
                "normal",
                "squamous cell carcinoma",
            )
            for split in ("train", "val", "test")
        },
    ),
    "chest-xray-pneumonia": Layout(
        (
            "chest_xray/{train,val,test}/NORMAL/IM-0{115..116}-0001.jpeg",
            "chest_xray/{train,val,test}/PNEUMONIA/person{1..3}_virus_1.jpeg",
            "chest_xray/chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/IM-0115-0001.jpeg",
            "chest_xray/__MACOSX/chest_xray/train/NORMAL/._IM-0115-0001.jpeg",
        ),
        {"chest_xray/chest_xray/.DS_Store": b"x"},
        {split: {"normal": 2, "pneumonia": 3} for split in ("train", "val", "test")},
    ),
    "chestmnist": Layout(
        (),
        {"medmnist/chestmnist.npz": medmnist(14, labels=14)},
        {split: each(2, *FINDINGS) for split in ("train", "val", "test")},
    ),
    "chexpert-5x200": Layout(
        ("chexpert/CheXpert-v1.0-small/train/patient{38614..38623}/study1/view1_frontal.jpg",),
        {"chexpert/chexpert-5x200.csv": _chexpert()},
        {"test": each(2, "atelectasis", "cardiomegaly", "consolidation", "edema", "effusion")},
    ),
    "covidx-cxr": Layout(
        (
            "covidx-cxr2/test/MIDRC-RICORD-1C-419639-00{1..2}.png",
            "covidx-cxr2/test/{a,b}.png",
            "covidx-cxr2/train/c.png",
        ),
        {
            "covidx-cxr2/test.txt": "419639-003251 MIDRC-RICORD-1C-419639-001.png positive ricord\n"
            "419639-001464 MIDRC-RICORD-1C-419639-002.png positive ricord\n"
            "x1 a.png negative rsna\nx2 b.png negative rsna\n",
            "covidx-cxr2/train.txt": "x3 c.png negative rsna\n",
        },
        {"test": {"covid-19": 2, "other": 2}},
    ),
    "crc-5000": Layout(
        (
            "Kather_texture_2016_image_tiles_5000/{01_TUMOR,02_STROMA,03_COMPLEX,04_LYMPHO,05_DEBRIS,06_MUCOSA,07_ADIPOSE,"
            "08_EMPTY}/10009_CRC-Prim-HE-03_{1..40}.tif",
        ),
        {},
        {
            "all": each(
                MANY,
                "tumor epithelium",
                "simple stroma",
                "complex stroma",
                "immune cells",
                "debris",
                "normal mucosa",
                "adipose",
                "background",
            )
        },
    ),
    "ct-kidney": Layout(
        (
            "CT-KIDNEY-DATASET-Normal-Cyst-Tumor-Stone/CT-KIDNEY-DATASET-Normal-Cyst-Tumor-Stone/{Cyst,Normal,Stone,Tumor}/"
            "X- ({1..2}).jpg",
        ),
        {"kidneyData.csv": ",image_id,path,diag,target,Class\n"},
        {"test": each(2, "cyst", "normal", "stone", "tumor")},
    ),
    "ddi": Layout(
        ("ddi/images/00000{1..4}.png",),
        {
            "ddi/ddi_metadata.csv": lines(
                ",DDI_ID,DDI_file,skin_tone,malignant,disease",
                (
                    "0,1,000001.png,56,True,melanoma-in-situ",
                    "1,2,000002.png,12,False,blue-nevus",
                    "2,3,000003.png,34,False,acne",
                    "3,4,000004.png,34,True,melanoma",
                ),
            )
        },
        {"test": {"benign": 2, "malignant": 2}},
    ),
    "derm7pt": Layout(
        ("release_v0/images/Nel/Nel{0..9}.jpg", "release_v0/images/Nel/Ndl{0..799}.jpg"),
        {
            "release_v0/meta/meta.csv": lines(
                "case_num,diagnosis,seven_point_score,pigment_network,streaks,pigmentation,regression_structures,"
                "dots_and_globules,blue_whitish_veil,vascular_structures,level_of_diagnostic_difficulty,elevation,"
                "location,sex,management,clinic,derm,case_id,notes",
                (
                    f"{i + 1},{name},0,absent,absent,absent,absent,absent,absent,arborizing,medium,nodular,abdomen,"
                    f"female,excision,Nel/Nel{i}.jpg,Nel/Ndl{i}.jpg,,"
                    for i, name in classed(*DERM7PT)
                ),
            ),
            "release_v0/meta/{train,valid,test}_indexes.csv": "indexes\n6\n8\n",
        },
        {"all": {name: MANY * list(DERM7PT.values()).count(name) for name in DERM7PT.values()}},
    ),
    "dermamnist": mnist("dermamnist", *SKIN, shape=(28, 28, 3)),
    "fetal-planes": Layout(
        ("FETAL_PLANES_DB/Images/Patient{1..12}_Plane1_1_of_1.png",),
        {
            "FETAL_PLANES_DB/FETAL_PLANES_DB_data.csv": lines(
                "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train ",
                (
                    f"Patient{i + 1}_Plane1_1_of_1;{i + 1};{plane};Not A Brain;Op. 1;Aloka;{1 - i // 6} "
                    for i, plane in enumerate(
                        2 * ["Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other"]
                    )
                ),
                end="\r\n",
            )
        },
        {
            split: each(1, "fetal abdomen", "fetal brain", "fetal femur", "fetal thorax", "maternal cervix", "other")
            for split in ("train", "test")
        },
    ),
    "fitzpatrick17k": Layout(
        tuple(f"fitzpatrick17k/images/{i:032x}.jpg" for i in range(120)),
        {
            "fitzpatrick17k/fitzpatrick17k.csv": lines(
                "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url,"
                "url_alphanum",
                (
                    f"{i:032x},{i % 7 or -1},3,psoriasis,inflammatory,{name},,https://www.dermaamin.com/a.jpg,httpsa.jpg"
                    for i, name in classed("benign", "malignant", "non-neoplastic")
                ),
            )
        },
        {"all": each(MANY, "benign", "malignant", "non-neoplastic")},
    ),
    "gastrovision": Layout(
        (
            *tuple(
                f"gastrovision/images/{name}/1a8df39f-4959-42f5-{{train,validate,test}}.jpg" for name in GASTROVISION
            ),
            "gastrovision/images/{Angiectasia,Ulcer}/9a8df39f-4959-42f5-a206.jpg",
        ),
        {
            f"gastrovision/Split/{split}.csv": lines(
                "Filename,Class", (f"1a8df39f-4959-42f5-{split}.jpg,{name}" for name in GASTROVISION)
            )
            for split in ("train", "validate", "test")
        },
        {split: each(1, *GASTROVISION.values()) for split in ("train", "val", "test")},
    ),
    "ham10000": Layout(
        (
            "ham10000/HAM10000_images_part_1/ISIC_{0..139}.jpg",
            "ham10000/HAM10000_images_part_2/ISIC_{140..279}.jpg",
            "ham10000/HAM10000_segmentations_lesion_tschandl/ISIC_{0..9}_segmentation.png",
            "ham10000/ISIC2018_Task3_Test_Images/ISIC_00{34524..34526}.jpg",
        ),
        {
            "ham10000/HAM10000_metadata": lines(
                "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset",
                (
                    f"HAM_{i},ISIC_{i},{dx},histo,80.0,male,scalp,vidir_modern"
                    for i, dx in classed("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
                ),
            )
        },
        {"all": each(MANY, *SKIN)},
    ),
    "hyperkvasir": Layout(
        tuple(
            f"hyper-kvasir/labeled-images/{'upper' if name in UPPER else 'lower'}-gi-tract/x/{name}/{name}-{{0..1}}.jpg"
            for name in HYPERKVASIR
        ),
        {
            "hyper-kvasir/2_fold_split.csv": lines(
                "file-name;class-name;split-index",
                (f"{name}-{fold}.jpg;{name};{fold}" for name in HYPERKVASIR for fold in (0, 1)),
            ),
            "hyper-kvasir/labeled-images/image-labels.csv": "Video file,Organ,Finding,Classification\n",
        },
        {split: each(1, *HYPERKVASIR.values()) for split in ("train", "test")},
    ),
    "idrid": Layout(
        ("idrid/B. Disease Grading/1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_00{1..5}.jpg",),
        {
            "idrid/B. Disease Grading/2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv": lines(
                "Image name,Retinopathy grade,Risk of macular edema ", (f"IDRiD_00{i + 1},{i},0" for i in range(5))
            ),
            "idrid/B. Disease Grading/2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv": lines(
                "Image name,Retinopathy grade,Risk of macular edema ,,", ["IDRiD_001,4,2,,"]
            ),
        },
        {"test": each(1, *GRADES)},
    ),
    "isic2020": Layout(
        ("isic2020/train/ISIC_{0..79}.jpg",),
        {
            "isic2020/ISIC_2020_Training_GroundTruth.csv": lines(
                "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target",
                (f"ISIC_{i},IP_{i},male,45.0,head/neck,unknown,benign,{target}" for i, target in classed("0", "1")),
            )
        },
        {"all": each(MANY, "benign", "melanoma")},
    ),
    "kvasir": Layout(
        (
            "kvasir-dataset-v2/{dyed-lifted-polyps,dyed-resection-margins,esophagitis,normal-cecum,normal-pylorus,"
            "normal-z-line,polyps,ulcerative-colitis}/0be91a4e-be3d-{201..240}.jpg",
        ),
        {},
        {
            "all": each(
                MANY,
                "dyed lifted polyp",
                "dyed resection margin",
                "esophagitis",
                "cecum",
                "pylorus",
                "z-line",
                "polyp",
                "ulcerative colitis",
            )
        },
    ),
    "lc25000-colon": _listed("LC25000_colon", ("colon_aca", "colon_n")),
    "lc25000-lung": _listed("LC25000_lung", ("lung_aca", "lung_n", "lung_scc")),
    "limuc": Layout(
        (
            "limuc/train_and_validation_sets/Mayo {0..3}/UC_patient_100_{15..17}.bmp",
            "limuc/test_set/Mayo {0..3}/UC_patient_101_{1..2}.bmp",
            "limuc/patient_based_classified_images/100/Mayo {0..3}/UC_patient_100_15.bmp",
        ),
        {},
        {
            "train": each(3, "Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"),
            "test": each(2, "Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3"),
        },
    ),
    "lunghist700": Layout(
        ("LungHist700/images/{aca_bd,aca_md,aca_pd,nor,scc_bd,scc_md,scc_pd}/x_20x_{1..2}.jpg",),
        {"LungHist700/data.csv": "x\n"},
        {"test": {"adenocarcinoma": 6, "normal": 2, "squamous cell carcinoma": 6}},
    ),
    "med-node": Layout(
        ("complete_mednode_dataset/melanoma/{896,2827}.jpg", "complete_mednode_dataset/naevus/{19085,21457}.jpg"),
        {},
        {"test": {"melanoma": 2, "nevus": 2}},
    ),
    "mhist": Layout(
        ("mhist/images/MHIST_aa{a,b,c,d}.png",),
        {
            "mhist/annotations.csv": lines(
                "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition",
                (
                    "MHIST_aaa.png,SSA,6,train",
                    "MHIST_aab.png,HP,0,train",
                    "MHIST_aac.png,SSA,5,test",
                    "MHIST_aad.png,HP,2,test",
                ),
            )
        },
        {split: {"hyperplastic polyp": 1, "sessile serrated adenoma": 1} for split in ("train", "test")},
    ),
    "nct-crc": Layout(
        tuple(
            f"nct_crc/{folder}/{code}/{code}-{tile}.tif"
            for code in ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
            for folder, tile in (
                ("NCT-CRC-HE-100K", "AAAFLC{1..3}"),
                ("CRC-VAL-HE-7K", "TCGA{1..2}"),
                ("NCT-CRC-HE-100K-NONORM", "AAAFLC{1..3}"),
            )
        ),
        {},
        {"train": each(3, *TISSUE), "test": each(2, *TISSUE)},
    ),
    "nerthus": Layout(
        ("nerthus-dataset-frames/{0,1,2,3}/bowel_3_score_1-0_0000000{1..2}.jpg",),
        {"nerthus-dataset-frames/README.txt": "x"},
        {"test": each(2, "score 0", "score 1", "score 2", "score 3")},
    ),
    "nih-chestxray14": Layout(
        tuple(f"CXR8/images/{i:08}_000.png" for i in range(600)),
        {"CXR8/Data_Entry_2017_v2020.csv": _cxr14(), "CXR8/{test_list,train_val_list}.txt": "00000001_000.png\n"},
        {"all": each(MANY, *FINDINGS) | {"mass": MANY + 1, "hernia": MANY + 1}},
    ),
    "oct-c8": Layout(
        ("retinal_oct_c8/images/{train,val,test}/{AMD,CNV,CSR,DME,DR,DRUSEN,MH,NORMAL}/amd_test_{1001..1002}.jpg",),
        {},
        {
            split: each(
                2,
                "age-related macular degeneration",
                "choroidal neovascularization",
                "central serous retinopathy",
                "diabetic macular edema",
                "diabetic retinopathy",
                "drusen",
                "macular hole",
                "normal",
            )
            for split in ("train", "val", "test")
        },
    ),
    "oct2017": Layout(
        (
            "kermany2018/OCT2017 /{train,val,test}/{CNV,DME,DRUSEN,NORMAL}/CNV-1016042-{1..2}.jpeg",
            "kermany2018/oct2017/OCT2017 /{train,val,test}/{CNV,DME,DRUSEN,NORMAL}/CNV-1016042-{1..2}.jpeg",
        ),
        {"kermany2018/OCT2017 /.DS_Store": b"x"},
        {split: each(2, *OCT) for split in ("train", "val", "test")},
    ),
    "octdl": Layout(
        tuple(
            f"octdl/OCTDL/{code}/{code.lower()}_{{1..40}}.jpg"
            for code in ("AMD", "DME", "ERM", "NO", "RAO", "RVO", "VID")
        ),
        {
            "octdl/OCTDL_labels.csv": lines(
                "file_name,disease,subcategory,condition,patient_id,eye,sex,year,image_width,image_hight",
                (
                    f"{code.lower()}_{i % MANY + 1},{code},early,drusen,{i},OD,F,60,1000,500"
                    for i, code in classed("AMD", "DME", "ERM", "NO", "RAO", "RVO", "VID")
                ),
            )
        },
        {
            "all": each(
                MANY,
                "age-related macular degeneration",
                "diabetic macular edema",
                "epiretinal membrane",
                "normal",
                "retinal artery occlusion",
                "retinal vein occlusion",
                "vitreomacular interface disease",
            )
        },
    ),
    "octmnist": mnist("octmnist", *OCT),
    "odir-5k": Layout(
        ("odir/preprocessed_images/{0..319}_right.jpg", "odir/ODIR-5K/ODIR-5K/Training Images/{0..3}_{left,right}.jpg"),
        {"odir/full_df.csv": _odir()},
        {
            "all": each(
                MANY,
                "normal",
                "diabetic retinopathy",
                "glaucoma",
                "cataract",
                "age-related macular degeneration",
                "hypertension",
                "myopia",
                "other",
            )
        },
    ),
    "organamnist": mnist("organamnist", *ORGANS),
    "organcmnist": mnist("organcmnist", *ORGANS),
    "organsmnist": mnist("organsmnist", *ORGANS),
    "pad-ufes-20": Layout(
        tuple(f"pad_ufes_20/images/imgs_part_{i % 3 + 1}/PAT_{i}_1_{i}.png" for i in range(6 * MANY)),
        {
            "pad_ufes_20/metadata.csv": lines(
                "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,"
                "skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,"
                "diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,biopsed",
                (
                    f"PAT_{i},1,,,,,8,,,,,,,,ARM,,,{code},False,False,False,False,False,False,PAT_{i}_1_{i}.png,False"
                    for i, code in classed("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")
                ),
            )
        },
        {
            "all": each(
                MANY,
                "actinic keratosis",
                "basal cell carcinoma",
                "melanoma",
                "naevus",
                "squamous cell carcinoma",
                "seborrhoeic keratosis",
            )
        },
    ),
    "panda": Layout(
        (),
        {
            "panda/train_images/0005f7aaab28{10..21}.tiff": write_slide,
            "panda/train_label_masks/0005f7aaab28{10..11}_mask.tiff": write_slide,
            "panda/train.csv": lines(
                "image_id,data_provider,isup_grade,gleason_score",
                (f"0005f7aaab28{10 + i},karolinska,{i % 6},0+0" for i in range(12)),
            ),
            "panda/test.csv": "image_id,data_provider\n",
        },
        {"test": each(8, *(f"ISUP grade {i}" for i in range(6)))},
    ),
    "pathmnist": mnist("pathmnist", *TISSUE, shape=(28, 28, 3)),
    "pathvqa": Layout(
        (),
        {
            f"path-vqa/data/{split}-00000-of-00001-0123456789abcdef.parquet": parquet(
                "answer", ["in the canals of hering", "yes", "no"], question=["where are they?", "is it?", "is it new?"]
            )
            for split in ("train", "validation", "test")
        }
        | {"path-vqa/README.md": "x"},
        {split: {"rows": 3} for split in ("train", "val", "test")},
    ),
    "pcam": Layout(
        (),
        {
            f"PatchCamelyon/data/{split}-0000{{0..1}}-of-00002-bb04e6313f58efa0.parquet": parquet(
                "label", [True, False]
            )
            for split in ("train", "valid", "test")
        }
        | {"PatchCamelyon/README.md": "x"},
        {split: each(2, "normal", "tumor") for split in ("train", "val", "test")},
    ),
    "pneumoniamnist": mnist("pneumoniamnist", "normal", "pneumonia"),
    "retinamnist": mnist("retinamnist", *GRADES, shape=(28, 28, 3)),
    "rfmid": Layout(
        ("A. RFMiD_All_Classes_Dataset/1. Original Images/{a. Training,b. Validation,c. Testing} Set/{1..4}.png",),
        {
            f"A. RFMiD_All_Classes_Dataset/2. Groundtruths/{name}": lines(
                "ID,Disease_Risk,DR,ARMD,MH", (f"{i},{int(i > 1)},{int(i == 2)},0,{int(i > 2)}" for i in (1, 2, 3, 4))
            )
            for name in (
                "a. RFMiD_Training_Labels.csv",
                "b. RFMiD_Validation_Labels.csv",
                "c. RFMiD_Testing_Labels.csv",
            )
        },
        {"test": {"normal": 1, "disease": 3}},
    ),
    "rim-one-dl": Layout(
        (
            "RIM-ONE_DL_images/partitioned_by_hospital/training_set/{glaucoma,normal}/r2_Im{363..365}.png",
            "RIM-ONE_DL_images/partitioned_by_hospital/test_set/{glaucoma,normal}/r1_Im00{3..4}.png",
            "RIM-ONE_DL_images/partitioned_randomly/{training_set,test_set}/{glaucoma,normal}/r2_Im365.png",
        ),
        {"RIM-ONE_DL_images/LICENSE.txt": "x"},
        {"train": each(3, "glaucoma", "normal"), "test": each(2, "glaucoma", "normal")},
    ),
    "rocov2": Layout(
        ("rocov2/test/ROCOv2_2023_test_00000{1..3}.jpg", "rocov2/train/ROCOv2_2023_train_000001.jpg"),
        {
            "rocov2/test_captions.csv": lines(
                "ID,Caption", (f'ROCOv2_2023_test_00000{i},"CT of the chest, figure {i}"' for i in (1, 2, 3))
            ),
            "rocov2/train_captions.csv": "ID,Caption\nROCOv2_2023_train_000001,An MRI\n",
            "rocov2/test_concepts.csv": "ID,CUIs\nROCOv2_2023_test_000001,C0040405\n",
        },
        {"test": {"rows": 3}},
    ),
    "rsna-pneumonia": Layout(
        (),
        {
            **{f"rsna_pneumonia/stage_2_train_images/0004cfab-{i:04}.dcm": dicom() for i in range(80)},
            "rsna_pneumonia/stage_2_test_images/0000a175-0{1..3}.dcm": dicom(),
            "rsna_pneumonia/stage_2_train_labels.csv": lines(
                "patientId,x,y,width,height,Target",
                (
                    f"0004cfab-{i:04},{'264.0,152.0,213.0,379.0' if target == '1' else ',,,'},{target}"
                    for i, target in classed("0", "1")
                    for _ in range(1 + (target == "1" and i % 2))
                ),
            ),
        },
        {"all": each(MANY, "no opacity", "opacity")},
    ),
    "sars-cov-2-ct": Layout(
        ("sarscov2_ct/COVID/Covid ({1..3}).png", "sarscov2_ct/non-COVID/Non-Covid ({1..2}).png"),
        {},
        {"test": {"covid-19": 3, "other": 2}},
    ),
    "slake": Layout(
        ("slake/imgs/xmlab{0..9}/{source.jpg,mask.png}",),
        {
            "slake/train.json": slake(range(4)),
            "slake/validation.json": slake(range(4, 6)),
            "slake/test.json": slake(range(6, 10)),
            "slake/imgs/xmlab{0..9}/detection.json": "[]",
            "slake/KG/en_disease.csv": "x\n",
            "slake/mask.txt": "x",
        },
        {"train": {"rows": 4}, "val": {"rows": 2}, "test": {"rows": 4}},
    ),
    "tcga-blca": tcga("blca", "BLCA"),
    "tcga-brca": tcga("brca", "IDC", ("0.0", "1.0")),
    "tcga-brca-subtype": subtypes(),
    "tcga-coadread": tcga("coadread", "COAD", ("0.0", "1.0")),
    "tcga-gbmlgg": tcga("gbmlgg", "GBM", ("0.0", "1.0")),
    "tcga-hnsc": tcga("hnsc", "HNSC"),
    "tcga-kirc": tcga("kirc", "CCRCC"),
    "tcga-kirp": tcga("kirp", "PRCC", ("0.0", "1.0")),
    "tcga-lihc": tcga("lihc", "HCC", ("0.0", "1.0")),
    "tcga-luad": tcga("luad", "LUAD", ("0.0", "1.0")),
    "tcga-lusc": tcga("lusc", "LUSC", ("0.0", "1.0")),
    "tcga-stad": tcga("stad", "STAD", ("0.0", "1.0")),
    "tcga-ucec": tcga("ucec", "UEC"),
    "tissuemnist": mnist(
        "tissuemnist",
        "collecting duct",
        "distal tubule",
        "glomerular endothelium",
        "interstitial endothelium",
        "leukocyte",
        "podocyte",
        "proximal tubule",
        "thick ascending limb",
    ),
    "vqa-rad": Layout(
        ("vqa_rad/VQA_RAD Image Folder/synpic{0..4}.jpg",),
        {
            "vqa_rad/VQA_RAD Dataset Public.json": json.dumps(vqa_rad()),
            "vqa_rad/VQA_RAD Dataset Public.{xml,xlsx}": "x",
            "vqa_rad/Readme.docx": "x",
        },
        {"train": {"rows": 3}, "test": {"rows": 2}},
    ),
}
