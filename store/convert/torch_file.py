"""PyTorch's `.pt` zip files of named tensors, read and written without PyTorch and without trusting them: `data.pkl`, a
pickle that may name a handful of constructors, and `data/0`, `data/1`, ..., raw bytes. Layout: PyTorch,
torch/serialization.py and torch/_utils.py (`_rebuild_tensor_v2`)."""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError

MAX_FILE_BYTES = 1 << 26
"""64 MiB: a sample's features have some 30 KB."""

MAX_PICKLE_BYTES = 1 << 20

# Storage classes by their pickled name. bfloat16 has no NumPy type and occurs in no release.
_STORAGES = {"DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2")}
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, struct.error)
# ArithmeticError and LookupError: OverflowError, IndexError, KeyError.
_PICKLE_ERRORS = (
    *(pickle.UnpicklingError, AttributeError, ImportError, MemoryError, TypeError, ValueError),
    *(ArithmeticError, LookupError),
)


def read_tensors(data: bytes) -> dict[str, NDArray[np.floating[Any]]]:
    """Read a dict of float tensors. Raises CorpusError if it is damaged, or a pickle of anything but tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if sum(info.file_size for info in members.values()) > MAX_FILE_BYTES:
                raise CorpusError(f"unpacks to more than {MAX_FILE_BYTES >> 20} MB")
            if "data.pkl" not in members or members["data.pkl"].file_size > MAX_PICKLE_BYTES:
                raise CorpusError("holds no data.pkl of a PyTorch file")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CorpusError("is of a big-endian machine")
            names = [name for name in members if name.startswith("data/")]
            stored = {name.removeprefix("data/"): archive.read(members[name]) for name in names}
            content = _TensorUnpickler(archive.read(members["data.pkl"]), stored).load()
    except _ZIP_ERRORS as error:  # RuntimeError: of an encrypted member, and RecursionError
        raise CorpusError(f"is not a PyTorch zip file: {error}") from error
    except _PICKLE_ERRORS as error:
        raise CorpusError(f"cannot be read as tensors: {error}") from error
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, np.ndarray) for value in content.values()):
        raise CorpusError("holds something else than a dict of tensors")
    return dict(content)


class _Rebuild:
    """Replaces `torch._utils._rebuild_tensor_v2`; without attributes, so a pickle cannot change it."""

    __slots__ = ()

    def __call__(self, storage: object, offset: int, size: Any, stride: Any, *_: object) -> NDArray[np.floating[Any]]:
        if not isinstance(storage, np.ndarray) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor without a storage")
        if min((offset, *size, *stride), default=0) < 0:
            raise pickle.UnpicklingError("a tensor with a negative size")
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
        if int(np.prod(size, dtype=np.float64)) > len(storage):
            raise pickle.UnpicklingError("a tensor larger than its storage")
        strides = tuple(step * storage.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False).copy()


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, stored: Mapping[str, bytes]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._stored = stored

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which is not a tensor")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, values = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"refers to {kind!r}, expected a storage")
        body = self._stored[key]
        if len(body) != values * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {len(body)} bytes, expected {values * dtype.itemsize}")
        return np.frombuffer(body, dtype=dtype)


def write_tensors(tensors: Mapping[str, NDArray[np.float32]], name: str) -> bytes:
    """Return the bytes of a `.pt` file that `torch.load(..., weights_only=True)` reads as a dict of 1-D float32
    tensors. `name`: first folder inside the zip; PyTorch uses the file's stem."""
    code = [b"\x80\x02}("]
    for index, (key, values) in enumerate(tensors.items()):
        storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(index)) + _text("cpu")
        storage += _integer(len(values)) + b"tQ"
        shape = _integer(0) + _integer(len(values)) + b"\x85" + _integer(1) + b"\x85"
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        code.append(_text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + hooks + b"tR")
    code.append(b"u.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        members = {"data.pkl": b"".join(code), "byteorder": b"little"}
        members |= {f"data/{i}": np.asarray(v, dtype="<f4").tobytes() for i, v in enumerate(tensors.values())}
        for member, data in (members | {"version": b"3\n"}).items():
            # A fixed time: equal features give equal bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}/{member}", (1980, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
