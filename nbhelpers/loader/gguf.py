"""A GGUF file read tensor by tensor: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The header is read here: the gguf package's reader takes seconds and half a GB for a vocabulary of 150,000, and a
damaged file makes it fail in numpy. Every size that the header states is held against the file's before it is used.
Tensors are dequantised by the gguf package, or on a card by gguf_blocks.py, a piece of the file at a time, so that the
host holds one tensor and nothing is mapped into its memory.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nbhelpers import host

from . import gguf_blocks
from .shards import Entry, Shards

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
VERSIONS = (2, 3)
PIECE = 98_304  # numbers dequantised at once: whole blocks of 256, and gguf's temporaries stay in the processor's cache
PIECE_ON_CARD = 2**20  # with some 40 MB of temporaries
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # llama-gguf-split's names
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored(Entry):
    """A tensor of the file. `dtype` is what reading gives, `shape` in torch's order.

    `kind` is the type's name in ggml. `heads`: of a q or k matrix whose rows stand in rotated pairs, else 0.
    """

    kind: str
    heads: int = 0


@dataclass(frozen=True)
class Header:
    """What the files of one model state: `metadata` by GGUF's keys, `tensors` by GGUF's names, in the files' order."""

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class Tensors(Shards):
    """The tensors of GGUF files under the names and in the row order of a checkpoint; reading dequantises.

    Args:
        entries (`dict[str, Stored]`): By the checkpoint's names, in the order of the files.
    """

    def __init__(self, entries: dict[str, Stored]):
        self.entries, self._stored = dict(entries), entries
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the CPU in `dtype` (fp32), a view of the one buffer: copy it before the next read.

        Raises ValueError for a file that ends too early.
        """
        entry, dtype = self._stored[name], dtype or torch.float32
        count = math.prod(entry.shape)
        if self._buffer.numel() < count * dtype.itemsize:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        out = self._buffer[: count * dtype.itemsize].view(dtype)
        on_card = torch.cuda.is_available()
        size = PIECE_ON_CARD if on_card else PIECE
        for first in range(0, count, size):  # a second thread brought nothing
            last = min(first + size, count)
            out[first:last] = _dequantised(entry, name, first, last, on_card)
        tensor = out.view(entry.shape)
        return in_halves(tensor, entry.heads) if entry.heads else tensor


def in_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head (or numbers of a bias) reordered from rotated pairs to first halves, second halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _dequantised(entry: Stored, name: str, first: int, last: int, on_card: bool) -> torch.Tensor:
    """Numbers `first` to `last` of a tensor, whole blocks, in fp32."""
    import gguf

    kind = gguf.GGMLQuantizationType[entry.kind]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    nbytes = (last - first) // block * width
    raw = np.fromfile(entry.file, np.uint8, nbytes, offset=entry.start + first // block * width)
    if raw.size < nbytes:
        raise ValueError(f"{entry.file} ends inside {name}: download it again")
    if on_card:
        return gguf_blocks.dequantise(torch.from_numpy(raw).view(-1, width).cuda(), entry.kind).flatten()
    return torch.from_numpy(gguf.quants.dequantize(raw[None], kind)[0])


# ------------------------------------------------------------------------------------------------------ which files


def is_gguf(path: Path) -> bool:
    """Whether it means a GGUF: a file, a name that ends so, or a folder whose only weights are such files."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("model*.safetensors"))
    return path.is_file() or path.suffix == ".gguf"


def is_part_of(file: Path, path: Path) -> bool:
    """Whether `file` is one of the GGUF files that `path`, a file, any part of a split one or a folder, means."""
    if not path.exists() or not is_gguf(path):
        return False
    parts = path.glob("*.gguf") if path.is_dir() else files_of(path)
    return file.resolve() in {part.resolve() for part in parts}


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of the one model that a file, any part of a split one, or a folder means, in order.

    Raises FileNotFoundError for a file or a part that is not there, ValueError for a folder that holds several models.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        models = {(found[1], found[3]) if (found := _PART.fullmatch(file.name)) else file.name for file in files}
        if len(models) > 1:
            raise ValueError(f"{path} holds several models: {', '.join(file.name for file in files)}. Pass one of them")
        path = files[0]
    if found := _PART.fullmatch(path.name):
        stem, count = found[1], int(found[3])
        parts = tuple(path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
        missing = [part.name for part in parts if not part.is_file()]
        if missing or not parts:
            raise FileNotFoundError(f"{path.parent} lacks {', '.join(missing)}, a part of {path.name}: download it too")
        return parts
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return (path,)


def read_header(files: tuple[Path, ...]) -> Header:
    """The header of a model, checked against the sizes of its files. No tensor is read.

    Args:
        files (`tuple[Path, ...]`): As `files_of` returns them. The first holds the metadata.

    Raises ValueError for a file that is no GGUF, of another version, big-endian, cut short or damaged, for a tensor in
    a type that is not read here, and for parts that are not of one model; host.CannotRun without the gguf package.
    """
    host.require("gguf")
    parts = [_read_part(file) for file in files]
    metadata = parts[0].metadata
    tensors: dict[str, Stored] = {}
    count = metadata.get("split.count", 1) or 1
    if count != len(files):
        raise ValueError(
            f"{files[0]} is one of {count} parts by its metadata, and of {len(files)} by its name: parts are found by "
            "the names that llama-gguf-split gives them, NAME-00001-of-0000N.gguf"
        )
    for number, part in enumerate(parts):
        if part.metadata.get("split.no", 0) != number:
            raise ValueError(
                f"{part.files[0]} is not part {number + 1} by its metadata: it was renamed, or is another's"
            )
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise ValueError(f"{part.files[0]} has {min(twice)} a second time: the parts are not of one model")
        tensors |= part.tensors
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"{files[0]} and its parts hold {len(tensors)} tensors and should hold {wanted}: they are not of one model"
        )
    return Header(files, metadata, tensors)


# ---------------------------------------------------------------------------------------------------- one file's header


class _Reader:
    """Little-endian values one after the other; none is read that the rest of the file could not hold."""

    def __init__(self, f: BinaryIO, size: int):
        self.f, self.left = f, size

    def raw(self, n: int) -> bytes:
        if n > self.left:
            raise ValueError("it ends inside its header")
        self.left -= n
        return self.f.read(n)

    def numbers(self, letter: str, count: int) -> tuple:
        return struct.unpack(f"<{count}{letter}", self.raw(count * struct.calcsize(f"<{letter}")))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        return self.raw(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        of, count = self.number("I"), self.number("Q")
        if of in _NUMBERS:
            return list(self.numbers(_NUMBERS[of], count))
        if of != _STRING:
            raise ValueError(f"an array of type {of}")
        if 8 * count > self.left:  # a string takes 8 bytes at least
            raise ValueError("it ends inside its header")
        return [self.text() for _ in range(count)]

    def tensors(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape in torch's order, type, offset in the data) of each."""
        for _ in range(count):
            name, dimensions = self.text(), self.number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = tuple(reversed(self.numbers("Q", dimensions)))
            yield name, shape, self.number("I"), self.number("Q")


def _read_part(file: Path) -> Header:
    size = file.stat().st_size
    with open(file, "rb") as f:
        magic, version = f.read(4), int.from_bytes(f.read(4), "little")
        if magic != b"GGUF":
            raise ValueError(f"{file} is no GGUF file (it begins with {magic!r}): pass one, or a model's folder")
        if version and not version & 0xFFFF:
            raise ValueError(f"{file} is a big-endian GGUF, which is not read here: take a little-endian one")
        try:
            if size < 24:
                raise ValueError("it ends inside its header")
            if version in VERSIONS:
                reader = _Reader(f, size - 8)
                tensor_count, value_count = reader.numbers("Q", 2)
                metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(value_count)}
                infos = list(reader.tensors(tensor_count))
        except (ValueError, MemoryError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from None
    if version not in VERSIONS:
        raise ValueError(f"{file} is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read here")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{file} is damaged (general.alignment is {alignment!r}): download it again")
    data = math.ceil((size - reader.left) / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        tensors[name] = _stored(file, name, shape, kind, data + offset)
    last = max(tensors.values(), key=lambda entry: entry.start + entry.nbytes, default=None)
    if last is not None and last.start + last.nbytes > size:
        raise ValueError(
            f"{file} is cut short: its tensors end at byte {last.start + last.nbytes:,} and the file at {size:,}. "
            "Download it again"
        )
    return Header((file,), metadata, tensors)


def _stored(file: Path, name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
    import gguf

    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    kind = known.get(number, f"type {number}")
    if kind not in TYPES:
        raise ValueError(
            f"{file}: {name} is in {kind}, which is not read here, only {', '.join(TYPES)}. Take the model's Q4_K_M, "
            "Q5_K_M, Q6_K or Q8_0 file"
        )
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % block or not all(shape):
        raise ValueError(f"{file} is damaged ({name} is {shape}, in blocks of {block}): download it again")
    return Stored(file, torch.float32, shape, start, math.prod(shape) // block * width, kind)
