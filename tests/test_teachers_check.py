"""`mmkd teachers`: the command line, the comparison with published features, conversion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmkd.base.errors import TeacherError
from mmkd.cli.main import main
from mmkd.extract.teachers import TeacherSpec, describe_teacher, load_teacher
from mmkd.extract.teachers.check import read_golden
from mmkd.extract.teachers.geometry import geometry_of, normalize, pixels_of
from mmkd.extract.teachers.published import the_nine
from tests import encoder_snapshots
from tests import teacher_snapshots as snapshots
from tests.teacher_parts import sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
CPU = torch.device("cpu")
RELEASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmkd_release"


class Terminal:
    """Runs `mmkd` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["mmkd", "teachers", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self._capsys.readouterr()
        return int(stop.value.code or 0), out, err


@pytest.fixture
def mmkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


def card_file(spec: TeacherSpec, folder: Path) -> Path:
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
    return path


def golden_folder(snapshot: snapshots.Snapshot, folder: Path, name: str) -> Path:
    """The original's layout with the reference's features."""
    teacher = load_teacher(snapshot.spec, describe_teacher(snapshot.spec), CPU)
    geometry = geometry_of(teacher.card.preprocessing)
    lines = []
    for number, picture in enumerate(snapshots.pictures()):
        caption = snapshots.CAPTIONS[number]
        sample = folder / "features" / f"s{number}"
        sample.mkdir(parents=True)
        picture.save(sample / "a.png")
        with torch.no_grad():
            pixels = torch.tensor(pixels_of(picture, [geometry])[geometry])[None]
            image = snapshot.image(normalize(pixels, teacher.card.preprocessing).expand(-1, 3, -1, -1))[0]
            text = snapshot.text(teacher.tokenize([caption])[0])[0]
        pair = {f"{name}_img": image / image.norm(), f"{name}_txt": text / text.norm()}
        torch.save({key: value.detach() for key, value in pair.items()}, sample / "clips_output.pt")
        lines.append(
            {"id": f"s{number}", "imgpath": f"features/s{number}/a.png", "txt": caption, "available_clips": [name]}
        )
    (folder / "meta.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def test_list(mmkd: Terminal) -> None:
    code, out, _ = mmkd("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:10]] == [teacher.slug for teacher in the_nine()]
    assert "medclip *" in out
    _, as_json, _ = mmkd("list", "--json")
    assert "Apache-2.0, gated" in next(line for line in out.splitlines() if line.startswith("h-optimus-0 "))
    assert len(json.loads(as_json)["encoders"]) == 14
    assert [card["slug"] for card in json.loads(as_json)["the_nine"]] == [teacher.slug for teacher in the_nine()]


def test_show(mmkd: Terminal, tmp_path: Path) -> None:
    code, out, _ = mmkd("show", "BMCA")
    assert code == 0
    recipe = yaml.safe_load(out.partition("recipe\n")[2])
    assert recipe["options"] == {"architecture": "ViT-L-14"}
    # What `show` prints is a card.
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(recipe))
    _, again, _ = mmkd("show", path, "--json")
    assert json.loads(again)["recipe"] == recipe


def test_show_of_one_tower(mmkd: Terminal) -> None:
    _, out, _ = mmkd("show", "Virchow2")
    assert "text tower    none: no text features, no zero-shot\n" in out
    assert "access        gated: accept the terms there, then run `hf auth login`\n" in out
    assert "tokenizer " not in out


@pytest.mark.integration
def test_check_of_one_tower(mmkd: Terminal, tmp_path: Path) -> None:
    seer, reader = tmp_path / "seer", tmp_path / "reader"
    for folder in (seer, reader):
        folder.mkdir()
    spec = encoder_snapshots.TOWERS["dinov2"](seer).spec
    code, out, _ = mmkd("check", card_file(spec, seer))
    assert (code, "32 x 32 pixels, no text tower\n" in out, "captions" in out) == (0, True, False)
    spec = encoder_snapshots.TEXTS["bert, mean"](reader).spec
    code, out, _ = mmkd("check", card_file(spec, reader))
    assert (code, "no image tower, 48 tokens\n" in out, "images" in out) == (0, True, False)
    code, _, err = mmkd("check", card_file(spec, reader), "--images", tmp_path)
    assert (code, "teacher mine has no image tower (its card lists text only)" in err) == (1, True)


def test_unknown_name(mmkd: Terminal) -> None:
    assert mmkd("show", "quitlnet")[::2] == (
        1,
        "Error: no teacher is called 'quitlnet': did you mean 'quiltnet'? "
        "For one of your own write quitlnet=local-dir:/path\n",
    )


def test_check_without_weights_says_so(mmkd: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.extract.teachers.source.HF_HUB_CACHE", str(tmp_path))
    code, out, err = mmkd("check", "quiltnet")
    assert (code, out) == (1, "")
    assert err.startswith(
        "Error: quiltnet was not checked: teacher 'quiltnet': wisdomik/QuiltNet-B-32/open_clip_config.json"
    )
    assert "HF_HUB_OFFLINE is set" in err
    assert err.count("\n") == 1
    code, _, err = mmkd("check", "medclip")
    assert code == 1
    assert "medclip was not checked" in err
    assert "then give medclip=local-dir:/folder" in err


def test_a_device_that_is_not_here_is_one_line(mmkd: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = mmkd("check", "plip", "--device", "gpu")
    assert (code, err) == (1, "Error: plip was not checked: there is no device 'gpu'; write cpu, cuda or cuda:0\n")
    code, _, err = mmkd("check", "plip", "--device", "cuda:1")
    assert (code, "'cuda:1': no CUDA device is available here" in err) == (1, True)


@pytest.mark.integration
def test_check(mmkd: Terminal, tmp_path: Path) -> None:
    spec = snapshots.biomedclip(tmp_path).spec
    code, out, _ = mmkd("check", card_file(spec, tmp_path), "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["dim"], report["image_size"], report["context_length"]) == (snapshots.DIM, [160, 160], 64)
    assert report["digest"] == describe_teacher(spec).digest
    assert report["captions_cut"] >= 1
    assert report["towers"]["image"]["not_finite"] == 0
    assert report["towers"]["image"]["norm_smallest"] > 0
    assert report["logit_scale"] == pytest.approx(np.exp(3.0), rel=1e-6)
    assert report["sound"]
    code, out, _ = mmkd("check", card_file(spec, tmp_path))
    assert "every weight accounted for" in out


def test_check_on_ones_own_pictures(mmkd: Terminal, tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    code, _, err = mmkd("check", card_file(spec, tmp_path), "--images", photographs)
    assert (code, "has no picture" in err) == (1, True)
    snapshots.pictures()[0].save(photographs / "a.png")
    (photographs / "notes.txt").write_text("not a picture")
    _, out, _ = mmkd("check", card_file(spec, tmp_path), "--images", photographs, "--json")
    assert json.loads(out)["towers"]["image"]["inputs"] == 1
    (photographs / "b.png").write_bytes((photographs / "a.png").read_bytes()[:900])
    code, _, err = mmkd("check", card_file(spec, tmp_path), "--images", photographs)
    assert (code, "b.png is a broken picture" in err) == (1, True)


def test_check_finds_nan(mmkd: Terminal, tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    weights = torch.load(tmp_path / "open_clip_pytorch_model.bin")
    weights["visual.proj"][0] = float("nan")
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    code, out, _ = mmkd("check", card_file(spec, tmp_path))
    assert (code, "6 NaN" in out) == (1, True)


def test_check_counts_nan_in_half_precision(mmkd: Terminal, tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    weights = torch.load(tmp_path / "open_clip_pytorch_model.bin")
    weights["visual.transformer.resblocks.0.mlp.c_fc.weight"] *= 1e5
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    _, out, _ = mmkd("check", card_file(spec, tmp_path), "--json")
    assert json.loads(out)["towers"]["image"]["not_finite_in_half"] == {"fp16": 6, "bf16": 0}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("make", "name"),
    [(snapshots.biomedclip, "BiomedCLIP"), (snapshots.medclip, "MedCLIP"), (snapshots.pmcclip, "PMCCLIP")],
)
def test_golden_features_tell_right_from_wrong(make: object, name: str, mmkd: Terminal, tmp_path: Path) -> None:
    assert callable(make)
    snapshot = make(tmp_path)
    golden = golden_folder(snapshot, tmp_path / "golden", name)
    code, out, _ = mmkd("check", card_file(snapshot.spec, tmp_path), "--golden", golden, "--json")
    report = json.loads(out)["golden"]
    assert (code, report["samples"], report["verdict"]) == (0, 3, "the original's model")
    assert report["smallest_image_cosine"] == pytest.approx(1, abs=1e-5)
    assert report["smallest_text_cosine"] == pytest.approx(1, abs=1e-5)
    for path in golden.rglob("clips_output.pt"):
        features = torch.load(path, weights_only=True)
        torch.save({key: value.roll(1) for key, value in features.items()}, path)
    code, out, _ = mmkd("check", card_file(snapshot.spec, tmp_path), "--golden", golden)
    assert (code, "not the original's model: 3 samples" in out) == (1, True)


def test_golden_without_this_teacher(mmkd: Terminal, tmp_path: Path) -> None:
    spec = snapshots.quiltnet(tmp_path).spec
    golden = golden_folder(snapshots.Snapshot(spec, *_references(tmp_path)), tmp_path / "golden", "PLIP")
    code, out, _ = mmkd("check", card_file(spec, tmp_path), "--golden", golden)
    assert (code, "no published feature to compare with: 0 samples" in out) == (0, True)
    code, _, err = mmkd("check", card_file(spec, tmp_path), "--golden", tmp_path)
    assert (code, "wants the original's folder with meta.jsonl" in err) == (1, True)


def _references(folder: Path) -> tuple[object, object]:
    snapshot = snapshots.quiltnet(folder)
    return snapshot.image, snapshot.text


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the original's samples are not beside the project")
def test_facts_of_the_published_features(tmp_path: Path) -> None:
    listed: dict[str, set[str]] = {}
    for line in (RELEASE / "meta.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if (RELEASE / sample["imgpath"]).is_file():
            for name in sample["available_clips"]:
                listed.setdefault(name, set()).add(sample["id"])
    found = {teacher.slug: read_golden(RELEASE, teacher.slug) for teacher in the_nine()}
    for teacher in the_nine():
        keys = set().union(*(listed.get(name, set()) for name in (teacher.name, *teacher.also_called)))
        assert {sample.key for sample in found[teacher.slug]} == keys
        for sample in found[teacher.slug]:
            for feature in (sample.image_feature, sample.text_feature):
                assert feature.shape == (teacher.dim,)
                assert feature.dtype == torch.float32
                assert float(feature.norm()) == pytest.approx(1, abs=1e-5)
    assert found["medclip"] == []
    # A teacher of another width is told apart before anything is compared.
    spec = snapshots.biomedclip(tmp_path).spec
    from mmkd.extract.teachers.check import check_teacher

    with pytest.raises(TeacherError, match=f"has width {snapshots.DIM}, its published features 512"):
        check_teacher(spec, CPU, golden=RELEASE)


@pytest.mark.integration
@pytest.mark.parametrize("form", [*snapshots.NINE, "bmca-pickle", "pubmedclip-half"])
def test_converting_keeps_the_teacher(form: str, mmkd: Terminal, tmp_path: Path) -> None:
    folder, target = tmp_path / "published", tmp_path / "converted"
    folder.mkdir()
    makers = snapshots.NINE | {
        "bmca-pickle": lambda at: snapshots.bmca(at, numpy_scalars=True),
        "pubmedclip-half": snapshots.pubmedclip_original,
    }
    spec = makers[form](folder).spec
    trust = ["--trust-pickle"] if form == "bmca-pickle" else []
    code, out, err = mmkd("convert", card_file(spec, tmp_path), target, *trust)
    assert code == 0, err
    moved = spec.model_copy(update={"source": f"local-dir:{target}"})
    original = spec.model_copy(update={"trust_pickle": bool(trust)})
    before, after = describe_teacher(original), describe_teacher(moved)
    assert before.digest == after.digest
    assert f"digest {after.digest}" in out
    assert not [path for path in target.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    one, other = load_teacher(original, before, CPU), load_teacher(moved, after, CPU)
    tokens, _ = one.tokenize(snapshots.CAPTIONS)
    assert torch.equal(other.tokenize(snapshots.CAPTIONS)[0], tokens)
    assert torch.equal(one.encode_texts(tokens), other.encode_texts(tokens))
    code, _, err = mmkd("convert", card_file(spec, tmp_path), target)
    assert (code, "exists already" in err) == (1, True)


def test_a_converted_file_cannot_be_changed_unseen(tmp_path: Path) -> None:
    from mmkd.extract.teachers.convert import convert_teacher

    folder, target = tmp_path / "published", tmp_path / "converted"
    folder.mkdir()
    spec = snapshots.quiltnet(folder).spec
    convert_teacher(spec, target)
    (weights,) = target.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(TeacherError, match="was changed after `mmkd teachers convert` wrote it"):
        describe_teacher(spec.model_copy(update={"source": f"local-dir:{target}"}))


def test_a_pickle_is_checked_only_when_it_is_trusted(mmkd: Terminal, tmp_path: Path) -> None:
    card = card_file(snapshots.bmca(tmp_path, numpy_scalars=True).spec, tmp_path)
    code, _, err = mmkd("check", card)
    assert (code, "trust" in err) == (1, True)
    code, out, err = mmkd("check", card, "--trust-pickle")
    assert code == 0, out + err
