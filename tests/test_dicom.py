"""DICOM against values computed from the standard's formulas, pydicom's own files, and files that mean harm."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from mmkd.base.errors import ConfigError
from mmkd.base.images.decoding import decode
from mmkd.base.images.dicom import decode_dicom, window_values
from mmkd.base.images.pixels import ASSUMED
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.decoding import decode_image, read_image
from mmkd.extract.index import create_indexed_store, list_corpus
from mmkd.extract.shard import final_rows
from mmkd.store import FeatureStore
from mmkd.store.samples import read_part

NAME = "Mustermann^Erika"


def make(pixels: np.ndarray, **attributes: object) -> Dataset:
    """A CT object around pixels (rows, columns) or (frames, rows, columns)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3"
    dataset.PatientName, dataset.PatientID, dataset.Modality = NAME, "4711", "CT"
    dataset.BodyPartExamined = "CHEST"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def encoded(dataset: Dataset) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def picture(dataset: Dataset) -> np.ndarray:
    """Pixels as a teacher would get them."""
    return np.asarray(decode(encoded(dataset)))


RAMP = np.arange(-1000, 1400, 6, dtype=np.int16).reshape(20, 20)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescale_and_window_are_the_standards(function: str) -> None:
    dataset = make(
        RAMP,
        RescaleSlope=2,
        RescaleIntercept=-24,
        WindowCenter=[40, 300],
        WindowWidth=[400, 9],
        VOILUTFunction=function,
    )
    hounsfield = RAMP.astype(float) * 2 - 24
    c, w = 40.0, 400.0
    expected = np.empty_like(hounsfield)
    for index, x in np.ndenumerate(hounsfield):  # C.11.2.1.2 as printed, value by value
        if function == "SIGMOID":
            expected[index] = 255 / (1 + np.exp(-4 * (x - c) / w))
        elif function == "LINEAR_EXACT":
            expected[index] = 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255
        elif x <= c - 0.5 - (w - 1) / 2:
            expected[index] = 0
        else:
            expected[index] = 255 if x > c - 0.5 + (w - 1) / 2 else ((x - (c - 0.5)) / (w - 1) + 0.5) * 255
    assert np.array_equal(picture(dataset), np.rint(expected).astype(np.uint8))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(function: str) -> None:
    dataset = make(RAMP, WindowCenter=100, WindowWidth=700, VOILUTFunction=function)
    theirs = pydicom.pixels.apply_windowing(RAMP, dataset)  # onto the range of the stored values
    ours = window_values(RAMP.astype(float), 100, 700, function) * 65535 - 32768
    assert np.allclose(theirs, ours, atol=1e-6)


def test_width_one_is_a_threshold() -> None:
    assert set(np.unique(picture(make(RAMP, WindowCenter=0, WindowWidth=1)))) == {0, 255}


EMPTY = Dataset()
OWN_RANGE = np.rint((RAMP - RAMP.min()) / np.ptp(RAMP.astype(float)) * 255)


@pytest.mark.parametrize(
    ("odd", "like", "said"),
    [
        ({"WindowCenter": 0, "WindowWidth": 0}, {}, "no usable window, own range"),
        ({"WindowCenter": "", "WindowWidth": ""}, {}, "no usable window, own range"),
        ({"WindowCenter": [9, 0], "WindowWidth": [0, 500]}, {"WindowCenter": 0, "WindowWidth": 500}, "window 2"),
        (
            {"WindowCenter": 0, "WindowWidth": 0.5},
            {"WindowCenter": 0, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
            "WindowWidth below 1",
        ),
        (
            {"WindowCenter": 0, "WindowWidth": 500, "VOILUTFunction": "CUBIC"},
            {"WindowCenter": 0, "WindowWidth": 500},
            "VOILUTFunction",
        ),
        (
            {"VOILUTSequence": Sequence([EMPTY]), "WindowCenter": 0, "WindowWidth": 500},
            {"WindowCenter": 0, "WindowWidth": 500},
            "VOI LUT without content",
        ),
        (
            {"RescaleSlope": None, "RescaleIntercept": -24, "WindowCenter": 0, "WindowWidth": 500},
            {"RescaleSlope": 1, "RescaleIntercept": -24, "WindowCenter": 0, "WindowWidth": 500},
            "no value in RescaleSlope",
        ),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, {}, "RescaleSlope 0"),
        ({"BitsStored": None, "HighBit": None, "PixelRepresentation": 1}, {}, "no BitsStored"),
        ({"PhotometricInterpretation": ""}, {}, "no PhotometricInterpretation"),
        ({"NumberOfFrames": 0}, {}, "NumberOfFrames below 1"),
        ({"SamplesPerPixel": None}, {}, "no SamplesPerPixel"),
    ],
)
def test_odd_headers_are_read_and_what_was_assumed_is_said(
    odd: dict[str, object], like: dict[str, object], said: str
) -> None:
    expected = picture(make(RAMP, **like)) if like else OWN_RANGE
    shown = decode(encoded(make(RAMP, **odd)))
    assert np.array_equal(np.asarray(shown), expected)
    assert said in shown.info[ASSUMED]
    assert NAME not in shown.info[ASSUMED]
    assert ASSUMED not in decode(encoded(make(RAMP, **like))).info


def test_files_without_preamble_or_transfer_syntax() -> None:
    whole = encoded(make(RAMP, WindowCenter=0, WindowWidth=500))
    plain = np.asarray(decode(whole))
    assert np.array_equal(np.asarray(decode(whole[132:])), plain)
    for implicit in (True, False):
        buffer = io.BytesIO()
        dataset = make(RAMP, WindowCenter=0, WindowWidth=500)
        pydicom.filewriter.write_dataset(
            _filled(buffer, implicit), pydicom.filewriter.correct_ambiguous_vr(dataset, True)
        )
        shown = decode(buffer.getvalue())
        assert np.array_equal(np.asarray(shown), plain)
        assert "no transfer syntax" in shown.info[ASSUMED]


def _filled(buffer: io.BytesIO, implicit: bool) -> pydicom.filebase.DicomBytesIO:
    file = pydicom.filebase.DicomFileLike(buffer)
    file.is_little_endian, file.is_implicit_VR = True, implicit
    return file


def test_what_was_assumed_is_in_the_row_of_a_sound_image(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(encoded(make(np.stack([RAMP] * 3), WindowCenter=0, WindowWidth=0)))
    image = decode_image(*read_image(image_source(str(tmp_path), "a.dcm#frame=1")), [])
    assert (image.reason, image.note) == (None, "note: DICOM: no usable window, own range")
    (tmp_path / "c.yaml").write_text("kind: dicom\npath: .\n")
    create_indexed_store(open_corpus(str(tmp_path / "c.yaml")), tmp_path / "s")
    table, _ = read_part(tmp_path / "s", 0)
    (row,) = final_rows(table, [True], [image], [None]).to_pylist()
    assert (row["status"], row["reason"]) == ("ok", image.note)


def test_padding_is_black_whatever_the_polarity() -> None:
    pixels = RAMP.copy()
    pixels[0, :2] = [-2000, -1990]
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        shown = picture(
            make(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990, PhotometricInterpretation=kind)
        )
        assert shown[0, :2].tolist() == [0, 0]
        assert shown[0, 2:].min() < shown[0, 2:].max()


def test_eight_unsigned_bits_without_a_window_are_what_they_are() -> None:
    values = np.arange(50, 150, dtype=np.uint8).reshape(10, 10)
    assert np.array_equal(picture(make(values)), values)


def test_monochrome1_is_inverted() -> None:
    plain = picture(make(RAMP, WindowCenter=0, WindowWidth=500))
    turned = picture(make(RAMP, WindowCenter=0, WindowWidth=500, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(turned, 255 - plain)


def test_no_window_takes_the_range_without_padding() -> None:
    pixels = RAMP.copy()
    pixels[0, 0] = -32000
    shown = picture(make(pixels, PixelPaddingValue=-32000))
    inside = RAMP.ravel()[1:].astype(float)
    expected = np.rint((inside - inside.min()) / (inside.max() - inside.min()) * 255)
    assert shown[0, 0] == 0
    assert np.array_equal(shown.ravel()[1:], expected)


def test_voi_lut_goes_before_the_window() -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 10, 16])
    item.add_new("LUTData", "US", [0, 65535, 13107, 26214])
    pixels = np.array([[0, 10, 11], [12, 13, 99]], dtype=np.uint16)
    shown = picture(make(pixels, VOILUTSequence=Sequence([item]), WindowCenter=5, WindowWidth=10))
    assert shown.tolist() == [[0, 0, 255], [51, 102, 102]]


def test_frames(tmp_path: Path) -> None:
    loop = np.stack([np.full((4, 4), 10 * i, dtype=np.uint8) for i in range(4)])
    loop[:, 0, 0], loop[:, 0, 1] = 0, 255
    (tmp_path / "a.dcm").write_bytes(encoded(make(loop)))
    assert np.asarray(decode((tmp_path / "a.dcm").read_bytes()))[2, 2] == 20
    for rule, expected in (("middle", [20]), ("first", [0]), ("all", [0, 10, 20, 30])):
        (tmp_path / "c.yaml").write_text(f"kind: dicom\npath: a.dcm\nframes: {rule}\n")
        corpus = open_corpus(str(tmp_path / "c.yaml"))
        rows = list(corpus_rows(corpus))
        data = [image_source(corpus.root, row.uri or "").read() for row in rows]
        assert [np.asarray(decode(frame))[2, 2] for frame in data] == expected
        assert len(set(data)) == len(expected)  # checksums tell frames apart
    with pytest.raises(ImageError, match="no such frame"):
        image_source(str(tmp_path), "a.dcm#frame=4").read()


def test_windows_of_enhanced_objects_are_the_frames_own() -> None:
    def group(centre: int) -> Dataset:
        window, item = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 2
        item.FrameVOILUTSequence = Sequence([window])
        return item

    frames = np.stack([np.array([[0, 100, 200]], dtype=np.uint8)] * 3)
    dataset = make(frames, PerFrameFunctionalGroupsSequence=Sequence([group(50), group(150), group(250)]))
    assert np.asarray(decode_dicom(encoded(dataset))).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("CT_small.dcm", "L", (128, 128)),
        ("MR_small_RLE.dcm", "L", (64, 64)),
        ("examples_palette.dcm", "RGB", (800, 350)),
        ("SC_rgb_rle_16bit.dcm", "RGB", (100, 100)),
        ("SC_ybr_full_422_uncompressed.dcm", "RGB", (100, 100)),
        ("examples_ybr_color.dcm", "RGB", (320, 240)),
        ("SC_rgb_jpeg_dcmtk.dcm", "RGB", (100, 100)),
        ("examples_jpeg2k.dcm", "RGB", (640, 480)),
    ],
)
def test_pydicoms_own_files(name: str, mode: str, size: tuple[int, int]) -> None:
    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip(f"{name} is not in this pydicom")
    shown = decode(Path(str(found)).read_bytes())
    assert (shown.mode, shown.size) == (mode, size)
    values = np.asarray(shown)
    assert values.max() > values.min()


def test_colours_are_what_they_are() -> None:
    # dcmtk's test card: its rows of colours are documented with the file, red on top.
    path = get_testdata_file("SC_ybr_full_422_uncompressed.dcm", download=False)
    assert np.abs(np.asarray(decode(Path(str(path)).read_bytes())).astype(int)[5, 50] - [254, 0, 0]).max() <= 2
    sixteen = get_testdata_file("SC_rgb_rle_16bit.dcm", download=False)
    assert np.asarray(decode(Path(str(sixteen)).read_bytes()))[5, 50].tolist() == [255, 0, 0]


def test_the_folder_gives_modality_and_no_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good = make(RAMP)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.dcm").write_bytes(encoded(good))
    strange = encoded(make(RAMP, BodyPartExamined="SIXTEEN_LETTERS_", Modality="MR"))
    (tmp_path / "d" / "b.dcm").write_bytes(strange.replace(b"SIXTEEN_LETTERS_", NAME.encode()))
    (tmp_path / "d" / "IM0001").write_bytes(encoded(good))
    (tmp_path / "d" / "README").write_text("no DICOM, no suffix")
    (tmp_path / "d" / "c.dcm").write_bytes(b"no DICOM, but a suffix")
    (tmp_path / "d" / "e.dcm").write_bytes(encoded(good)[:-100])
    create_indexed_store(open_corpus(str(tmp_path / "d")), tmp_path / "s")
    rows = FeatureStore.open(tmp_path / "s").sample_table().to_pylist()
    assert [(row["key"], row["modality"], row["body_part"], row["reason"]) for row in rows] == [
        ("IM0001", "CT", "CHEST", None),
        ("a.dcm", "CT", "CHEST", None),
        ("b.dcm", "MR", None, None),
        ("c.dcm", None, None, "row: not DICOM"),
        ("e.dcm", "CT", "CHEST", None),
    ]
    with pytest.raises(ImageError, match="damaged pixels"):
        decode((tmp_path / "d" / "e.dcm").read_bytes())
    everything = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert b"Mustermann" not in everything + repr(rows).encode()
    assert "Mustermann" not in caplog.text


def test_patients_are_told_apart_by_your_secret_only(tmp_path: Path) -> None:
    for name, patient in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / f"{name}.dcm").write_bytes(encoded(make(RAMP, PatientID=patient)))
    found = []
    for salt in ("one", "two"):
        (tmp_path / "c.yaml").write_text(f"kind: dicom\npath: .\npatient_salt: {salt}\n")
        found.append([row.labels["patient"] for row in corpus_rows(open_corpus(str(tmp_path / "c.yaml")))])
    assert found[0][0] == found[0][2] != found[0][1]
    assert not set(found[0]) & set(found[1])


def test_a_text_beside_a_dicom_file_is_its_caption(tmp_path: Path) -> None:
    (tmp_path / "d" / "p").mkdir(parents=True)
    files = {
        "loop.dcm": encoded(make(np.stack([RAMP, RAMP]))),
        "loop.txt": b"a loop",
        "loop.json": b'{"caption": "another"}',
        "p/a.dcm": encoded(make(RAMP)),
        "p/a.json": b'{"caption": "a chest", "site": "s1"}',
        "p/b.dcm": encoded(make(RAMP)),
        "p/c.dcm": b"none",
        "p/c.txt": b"lost",
        "report.txt": b"of nothing",
        "LICENSE": b"text " * 40,
        "LICENSE.txt": b"of a file that is not DICOM",
    }
    for name, data in files.items():
        (tmp_path / "d" / name).write_bytes(data)
    (tmp_path / "c.yaml").write_text("kind: dicom\npath: d\nframes: all\nlabel_fields: [site]\n")
    corpus = open_corpus(str(tmp_path / "c.yaml"))
    overview = list_corpus(corpus)
    assert [(row.key, row.caption, row.modality, row.labels, row.fault) for row in corpus_rows(corpus)] == [
        ("loop.dcm#0", "a loop", "CT", {"body_part": "CHEST", "site": None}, None),
        ("loop.dcm#1", "a loop", "CT", {"body_part": "CHEST", "site": None}, None),
        ("p/a.dcm", "a chest", "CT", {"body_part": "CHEST", "site": "s1"}, None),
        ("p/b.dcm", None, "CT", {"body_part": "CHEST", "site": None}, None),
        ("p/c.dcm", "lost", None, {"site": None}, "row: not DICOM"),
    ]
    assert (overview.images, overview.captions, overview.pairs) == (5, 4, 4)
    assert {reason: count for reason, (count, _) in overview.reasons.items()} == {
        "pair: no caption": 1,
        "row: not DICOM": 1,
    }
    assert overview.ignored == {
        "file: no DICOM file has its name": (2, "report.txt"),
        "file: without suffix and not DICOM": (1, "LICENSE"),
        "field: of a JSON sidecar, not among `label_fields`": (1, "caption"),
    }
    assert open_corpus(str(tmp_path / "d")).kind == "dicom"
    (tmp_path / "c.yaml").write_text("kind: dicom\npath: d\nimage_members: [a.png]\n")
    with pytest.raises(ConfigError, match="the images of a DICOM corpus are its DICOM files"):
        open_corpus(str(tmp_path / "c.yaml"))


def test_stores_of_earlier_versions_know_the_fields_that_are_not_set(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"")
    settings = json.loads(open_corpus(str(tmp_path)).settings())
    assert settings == {"kind": "dicom", "only": [], "frames": "middle", "patient_salt": None}
    (tmp_path / "c.yaml").write_text("kind: dicom\npath: .\ncaptions: each\n")
    assert json.loads(open_corpus(str(tmp_path / "c.yaml")).settings())["captions"] == "each"


def test_files_that_mean_harm(tmp_path: Path) -> None:
    huge = make(np.zeros((2, 2), dtype=np.uint8))
    huge.Rows = huge.Columns = 65535
    with pytest.raises(ImageError, match="more than 134,217,728 pixels"):
        decode(encoded(huge))
    packed = make(np.zeros((1000, 1000), dtype=np.uint8))
    packed.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    assert len(encoded(packed)) < 5000
    with pytest.raises(ImageError, match="deflated"):
        decode(encoded(packed))
    bare = make(RAMP)
    del bare.PixelData
    with pytest.raises(ImageError, match="no pixels"):
        decode(encoded(bare))
    with pytest.raises(ImageError):
        decode(b"\0" * 128 + b"DICM" + b"\xff" * 4000)
    # A JPEG inside that is larger than its header says.
    bomb = io.BytesIO()
    Image.new("L", (16000, 16000)).save(bomb, "JPEG")
    small = make(np.zeros((8, 8), dtype=np.uint8))
    small.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    small.PixelData = pydicom.encaps.encapsulate([bomb.getvalue()])
    small["PixelData"].is_undefined_length = True
    with pytest.raises(ImageError):
        decode(encoded(small))


@pytest.mark.parametrize("cut", range(132, 900, 61))
def test_any_cut_gives_a_reason(cut: int) -> None:
    with pytest.raises(ImageError, match="DICOM"):
        decode(encoded(make(RAMP))[:cut])


def odd_bytes(pixels: np.ndarray, big_endian: bool = False, **attributes: object) -> bytes:
    """A data set without file meta, as implicit little or explicit big endian; text stands for itself."""
    dataset = make(pixels.astype(pixels.dtype.newbyteorder(">" if big_endian else "<")))
    for name, value in attributes.items():
        if value is None:
            dataset.pop(pydicom.datadict.tag_for_keyword(name), None)
        else:
            tag = pydicom.datadict.tag_for_keyword(name)
            dataset.add_new(tag, "LO" if isinstance(value, str) else pydicom.datadict.dictionary_VR(tag), value)
    dataset["PixelData"].VR = "OW"
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = not big_endian, not big_endian
    pydicom.filewriter.write_dataset(buffer, dataset)
    return b"\0" * 128 + b"DICM" + buffer.getvalue()


STEPS = np.arange(16, dtype=np.uint16).reshape(4, 4) * 100
EVEN = np.arange(16).reshape(4, 4) * 17


@pytest.mark.parametrize(
    ("attributes", "note"),
    [
        ({"PhotometricInterpretation": "monochrome2"}, None),
        ({"PhotometricInterpretation": "MONOCHROME 2"}, "PhotometricInterpretation that does not fit, taken for MONO"),
        ({"PhotometricInterpretation": "YBR_FULL"}, "PhotometricInterpretation that does not fit, taken for MONO"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PhotometricInterpretation that does not fit, taken for MONO"),
        ({"PhotometricInterpretation": None}, "no PhotometricInterpretation, taken for MONOCHROME2"),
        ({"BitsAllocated": None}, "no BitsAllocated, taken for 16"),
        ({"BitsStored": 0, "HighBit": 15}, "BitsStored that does not fit, taken for 16"),
        ({"BitsStored": 17}, "BitsStored that does not fit, taken for 16"),
        ({"BitsStored": 12}, "HighBit that does not fit, taken for 11"),
        ({"HighBit": 7}, "HighBit that does not fit, taken for 15"),
        ({"HighBit": None}, "no HighBit, taken for 15"),
        ({"PixelRepresentation": None}, "no PixelRepresentation, taken for 0"),
        ({"NumberOfFrames": "-1"}, "NumberOfFrames below 1, taken for 1"),
        ({"RescaleSlope": "nan", "RescaleIntercept": "0"}, "no value in RescaleSlope, taken for 1"),
        ({"RescaleSlope": "1,5", "RescaleIntercept": "0"}, "no value in RescaleSlope, taken for 1"),
        ({"RescaleSlope": "3", "RescaleIntercept": "-9"}, None),
        ({"ModalityLUTSequence": [Dataset()]}, "modality LUT without content"),
        ({"VOILUTSequence": []}, None),
        ({"WindowCenter": "nan", "WindowWidth": "80"}, "no usable window, own range"),
    ],
)
def test_an_odd_header_beside_sound_pixels_is_read(attributes: dict[str, object], note: str | None) -> None:
    found = decode(odd_bytes(STEPS, **attributes))
    assert np.array_equal(np.asarray(found), EVEN)
    assumed = found.info[ASSUMED].removeprefix("DICOM: no transfer syntax, taken for little endian").removeprefix(", ")
    assert assumed.startswith(note or "")
    assert bool(assumed) == bool(note)


def test_big_endian_without_a_transfer_syntax() -> None:
    found = decode(odd_bytes(STEPS, big_endian=True))
    assert np.array_equal(np.asarray(found), EVEN)
    assert found.info[ASSUMED] == "DICOM: no transfer syntax, taken for big endian"


def test_values_below_the_high_bit_and_overlays_above_it() -> None:
    assert np.array_equal(picture(make(STEPS << 4, BitsStored=12, HighBit=15)), EVEN)
    signed = (STEPS.astype(np.int16) - 800) << 4
    assert np.array_equal(picture(make(signed, BitsStored=12, HighBit=15)), EVEN)
    assert np.array_equal(picture(make(STEPS.astype(np.int16) - 800, BitsStored=12, HighBit=15)), EVEN)
    assert np.array_equal(picture(make(STEPS | 0xF000, BitsStored=12, HighBit=11)), EVEN)


def test_a_falling_slope_and_a_picture_of_one_value() -> None:
    assert np.array_equal(picture(make(STEPS, RescaleSlope="-1", RescaleIntercept="0")), 255 - EVEN)
    inverted = make(STEPS, RescaleSlope="-1", RescaleIntercept="0", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(picture(inverted), EVEN)
    flat = make(np.full((4, 4), 1000, np.uint16), BitsStored=12, HighBit=11, RescaleSlope="2", RescaleIntercept="-1024")
    assert set(picture(flat).ravel()) == {round(1000 / 4095 * 255)}
    bits = make(np.array([[1, 0, 3, 2]], np.uint8), BitsStored=2, HighBit=1)
    assert picture(bits).tolist() == [[85, 0, 255, 170]]


def test_color_by_what_the_samples_are() -> None:
    colors = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5

    def colored(**attributes: object) -> bytes:
        shape = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Rows": 4, "Columns": 4, "NumberOfFrames": "1"}
        return odd_bytes(colors, **shape | {"PhotometricInterpretation": "RGB"} | attributes)

    for attributes in (
        {"SamplesPerPixel": None}, {"PlanarConfiguration": None}, {"PhotometricInterpretation": "MONOCHROME2"}
    ):  # fmt: skip
        assert np.array_equal(np.asarray(decode(colored(**attributes))), colors)
    full = np.asarray(decode(colored(PhotometricInterpretation="YBR_FULL")))
    assert np.array_equal(np.asarray(decode(colored(PhotometricInterpretation="YBR_FULL_422"))), full)
    for kind in ("HSV", "ARGB", "CMYK"):
        with pytest.raises(ImageError, match=f"color space {kind} is not read"):
            decode(colored(PhotometricInterpretation=kind))


def table(count: int, bits: int, entries: list[int]) -> Dataset:
    """An item of a LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [count, 0, bits])
    item.add_new("LUTData", "US", entries)
    return item


@pytest.mark.parametrize(
    ("items", "note"),
    [
        ([table(4, 8, [0, 50, 100, 255])], None),
        ([Dataset(), table(4, 8, [0, 50, 100, 255])], None),
        ([table(400, 8, [0, 50, 100, 255])], "VOI LUT with fewer entries than stated"),
        ([table(4, 0, [0, 50, 100, 255])], "VOI LUT without its bits, taken for 8"),
    ],
)
def test_a_lookup_table_that_is_odd(items: list[Dataset], note: str | None) -> None:
    found = decode(encoded(make(np.array([[0, 1, 2, 9]], np.uint16), VOILUTSequence=Sequence(items))))
    assert np.asarray(found).tolist() == [[0, 50, 100, 255]]
    assert found.info.get(ASSUMED) == (f"DICOM: {note}" if note else None)


def test_every_frame_says_what_was_assumed(tmp_path: Path) -> None:
    loop = make(np.stack([STEPS, STEPS.T]))
    del loop.BitsStored
    (tmp_path / "loop.dcm").write_bytes(encoded(loop))
    for frame, expected in ((0, EVEN), (1, EVEN.T)):
        found = decode(image_source(str(tmp_path), f"loop.dcm#frame={frame}").read())
        assert np.array_equal(np.asarray(found), expected)
        assert found.info[ASSUMED] == "DICOM: no BitsStored, taken for 16"
