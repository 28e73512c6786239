"""Write a teacher's weights as safetensors once, so that no unpickler is needed again."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.loaders import FileLoader, find_loader
from mmkd.extract.teachers.source import TOKENIZER_FILES, converted_name, file_sha256
from mmkd.extract.teachers.spec import LOCAL_DIR, TeacherSpec
from mmkd.extract.teachers.weights import (
    PAYLOAD_SHA256,
    PUBLISHED_SHA256,
    SAFETENSORS,
    read_tensors,
    safetensors_header,
)
from mmkd.store import TeacherCard


def convert_teacher(spec: TeacherSpec, target: Path) -> TeacherCard:
    """Write weights, configuration and tokenizer of `spec` into the new folder `target`, a source with the same digest:
    the converted files carry the hash of the published ones. Returns the card of the converted teacher. Raises
    TeacherError if the teacher cannot be read, the folder exists, or the loader is not one of ours."""
    loader = find_loader(spec)
    if not isinstance(loader, FileLoader):
        raise TeacherError(
            f"teacher {spec.slug!r} comes from another package's loader {spec.loader!r}; convert it there"
        )
    if target.exists():
        raise TeacherError(f"{target} exists already; name a folder that does not")
    plan = loader.plan(spec)
    expected = plan.card()
    temporary = target.with_name(f".{target.name}.converting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, path in plan.weights.items():
            converted = temporary / converted_name(name)
            if path.suffix == SAFETENSORS:
                shutil.copyfile(path, converted)
                continue
            # safetensors wants tensors that own their memory in one piece.
            tensors = {key: value.contiguous().clone() for key, value in read_tensors(path, spec.trust_pickle).items()}
            save_file(tensors, converted)
            payload = file_sha256(converted, skip=safetensors_header(converted)[0])
            save_file(tensors, converted, metadata={PUBLISHED_SHA256: file_sha256(path), PAYLOAD_SHA256: payload})
        for name, path in plan.companions.items():
            shutil.copyfile(path, temporary / name)
        if plan.text_config and "config.json" not in plan.companions:
            (temporary / "config.json").write_text(json.dumps(plan.text_config, indent=1), encoding="utf-8")
        folder = plan.tokenizer.folder if plan.tokenizer is not None else None
        for name in TOKENIZER_FILES:
            if folder is not None and (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        temporary.rename(target)
    except OSError as error:
        raise TeacherError(f"cannot write {target}: {error.strerror or error}; make room or get permission") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    changes = {"source": f"{LOCAL_DIR}{target.resolve()}", "revision": "", "text_source": "", "trust_pickle": False}
    card = loader.describe(spec.model_copy(update=changes))
    assert card.digest == expected.digest, "converting must not change who a teacher is"
    return card
