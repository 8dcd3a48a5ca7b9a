"""Files that are whole or absent, and names for their content.

Floor 1: knows nothing of models or images. Everything the project writes goes through here: a
file or folder appears under its final name in one rename, tensors carry the metadata they were
computed with, and `digest` gives the content hash that manifests quote.
"""

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NOTES: dict[str, dict[str, str]] = {}
"""What this process has loaded, kind -> name -> hash; read by the run manifest."""


class MismatchError(ValueError):
    """A stored file was made with another configuration than the one it is being read for."""


def note(kind: str, name: str, hash: str) -> None:
    """Record in `NOTES` that `name` (an encoder, an image set) with this content hash was loaded.

    The same name with another hash (a folder that changed meanwhile) is kept beside the first as
    `name (2)`: a manifest must not lose an input.
    """
    known = NOTES.setdefault(kind, {})
    key, number = name, 1
    while known.get(key, hash) != hash:
        number += 1
        key = f"{name} ({number})"
    known[key] = hash


# ---------------------------------------------------------------------------------------- hashes


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes, read as a stream (constant memory)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(obj: Any) -> str:
    """Stable hex sha256 of a value: same content, same digest, on any machine and in any process.

    Takes None, bool, int, float, str, bytes, paths, NumPy scalars and arrays, tensors, dataclasses,
    and lists, tuples, sets and dicts of these. Dicts and sets do not depend on their order; a
    list and a tuple of the same items are equal; 1, 1.0 and True differ. Arrays count with dtype
    and shape but neither with memory layout nor device.

    Raises:
        TypeError: for any other type (named), rather than hashing a memory address.

    """
    hasher = hashlib.sha256()
    _feed(hasher, obj)
    return hasher.hexdigest()


def _is_tensor(obj: Any) -> bool:
    # Who holds a tensor has loaded torch; who only wants JSON need not wait seconds for it
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor)


def _feed(hasher: Any, obj: Any) -> None:
    """Feed `obj` with type tag and length, so that no two different values share a byte stream."""

    def piece(tag: bytes, content: bytes) -> None:
        hasher.update(tag + struct.pack("<Q", len(content)))
        hasher.update(content)

    if isinstance(obj, np.generic):
        obj = obj.item()
    if obj is None:
        piece(b"n", b"")
    elif isinstance(obj, bool):
        piece(b"b", bytes([obj]))
    elif isinstance(obj, int):
        piece(b"i", str(obj).encode())
    elif isinstance(obj, float):
        piece(b"f", b"nan" if math.isnan(obj) else struct.pack("<d", obj))
    elif isinstance(obj, str):
        piece(b"s", obj.encode())
    elif isinstance(obj, bytes):
        piece(b"y", obj)
    elif isinstance(obj, os.PathLike):
        piece(b"p", Path(obj).as_posix().encode())
    elif _is_tensor(obj):
        import torch

        tensor = obj.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0)
        name = str(tensor.dtype).removeprefix("torch.")
        piece(b"a", f"{name}{tuple(tensor.shape)}".encode())
        piece(b"r", raw.tobytes())
    elif isinstance(obj, np.ndarray):
        if obj.dtype.hasobject:
            raise TypeError("digest: an array of Python objects has no stable content")
        array = np.ascontiguousarray(obj).astype(obj.dtype.newbyteorder("<"), copy=False)
        piece(b"a", f"{obj.dtype.name}{tuple(obj.shape)}".encode())
        piece(b"r", array.tobytes())
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        piece(b"c", type(obj).__name__.encode())
        _feed(hasher, {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)})
    elif isinstance(obj, Mapping):
        pairs = sorted((digest(key), value) for key, value in obj.items())
        piece(b"d", str(len(pairs)).encode())
        for key, value in pairs:
            piece(b"k", key.encode())
            _feed(hasher, value)
    elif isinstance(obj, set | frozenset):
        members = sorted(digest(item) for item in obj)
        piece(b"e", " ".join(members).encode())
    elif isinstance(obj, list | tuple):
        piece(b"l", str(len(obj)).encode())
        for item in obj:
            _feed(hasher, item)
    else:
        raise TypeError(f"digest: no stable content for a value of type {type(obj).__name__}")


# ------------------------------------------------------------------------------- atomic writing


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block ends well.

    The temporary name keeps the suffix, since many writers choose the format by it, and begins
    with a dot. On any exception, KeyboardInterrupt included, it is removed and `path` is as it
    was; a killed process leaves at most the dot file. Missing parent folders are made.

    Raises:
        FileNotFoundError: the block wrote nothing.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; rename it onto `path` if the block ends well.

    An existing folder at `path` is replaced as a whole: none of its files survive, and it is put
    back if the last rename fails. On any exception the temporary folder is removed.

    Raises:
        FileExistsError: `path` exists and is not a folder.

    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{token}-{path.name}")
    old = path.with_name(f".{token}-old-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------ JSON


def _plain(obj: Any, where: str) -> Any:
    """`obj` as JSON's own types; `where` is the place named in errors."""
    if _is_tensor(obj):
        obj = obj.detach().cpu().tolist()
    elif isinstance(obj, np.ndarray):
        obj = obj.tolist()
    elif isinstance(obj, np.generic):
        obj = obj.item()
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        if math.isinf(obj):
            raise ValueError(f"JSON cannot hold the infinite number at {where}")
        return None if math.isnan(obj) else obj
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise ValueError(f"JSON keys are text; found {key!r} at {where}")
        return {str(key): _plain(value, f"{where}.{key}") for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(obj)]
    if isinstance(obj, os.PathLike):
        return Path(obj).as_posix()
    moment = getattr(obj, "isoformat", None)  # datetime, pandas.Timestamp
    if callable(moment):
        text = moment()
        return None if text == "NaT" else text
    if type(obj).__name__ == "NAType":  # pandas.NA
        return None
    raise ValueError(f"JSON cannot hold the {type(obj).__name__} at {where}")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as JSON, atomically, keys in the order given, two-space indent, UTF-8.

    NumPy and pandas scalars, arrays, tensors, paths, dates and dataclasses become their plain
    forms. NaN (an undefined value) is written as null.

    Raises:
        ValueError: an infinite number, a key that is not text or a type without a JSON form; the
            message names its place. Nothing is written then.

    """
    text = json.dumps(_plain(obj, "$"), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not valid JSON; names the file and the place in it.

    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


# --------------------------------------------------------------------------------------- tensors


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, "torch.Tensor"],
    *,
    metadata: Mapping[str, Any],
) -> None:
    """Write named tensors and JSON-able `metadata` to one safetensors file, atomically.

    Tensors are moved to the CPU and detached; views and tensors that share memory are allowed
    (each is written in full). The file holds numbers and text only: reading it runs no code.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses shared memory; clone only then, shards are large
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    text = {key: json.dumps(_plain(value, key), allow_nan=False) for key, value in metadata.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=text)


def load_tensors(
    path: str | os.PathLike[str], *, expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Read `(tensors, metadata)` as written by `save_tensors`.

    With `expect`, each of its keys must be in the metadata with an equal value (compared as JSON,
    so a tuple equals a list); this is checked before any tensor is read.

    Raises:
        MismatchError: names the differing key, the expected and the found value.
        FileNotFoundError: no such file.
        ValueError: not a complete safetensors file; names it.

    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tensor file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            metadata = {key: json.loads(value) for key, value in raw.items()}
            for key, value in (expect or {}).items():
                wanted = _plain(value, key)
                if key not in metadata:
                    raise MismatchError(f"{path}: {key!r} expected {wanted!r}, found nothing")
                if metadata[key] != wanted:
                    raise MismatchError(
                        f"{path}: {key!r} expected {wanted!r}, found {metadata[key]!r}"
                    )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete tensor file: {error}") from error
