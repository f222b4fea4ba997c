"""The tensors of a safetensors checkpoint, read one at a time into one host buffer.

The host holds the largest tensor and no more, whatever the size of a shard: no file is mapped into memory, so none of
its pages count as this process's. The format: https://huggingface.co/docs/safetensors (8 bytes little-endian length
of the header, the header in JSON, the bytes of the tensors).
"""

import hashlib
import json
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from nbhelpers.files import read_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """Where one tensor is stored: `nbytes` bytes from byte `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Shards:
    """The checkpoint in a folder. `entries` is {tensor name: Entry} in the order of the files.

    Args:
        folder (`str` or `Path`): With model.safetensors, or shards and their index.

    Raises FileNotFoundError for a folder without weights or with a shard missing, ValueError for a pickle-only
    checkpoint or a damaged file.
    """

    def __init__(self, folder: str | Path):
        self.entries: dict[str, Entry] = {}
        for file in _files(Path(folder)):
            self.entries.update(_header(file))
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(entry.nbytes for entry in self.entries.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the CPU in `dtype` (the checkpoint's). It may live in the one buffer: copy it before the next
        read.

        Raises ValueError for a file that ends too early.
        """
        entry = self.entries[name]
        if self._buffer.numel() < entry.nbytes:
            self._buffer = torch.empty(self.largest, dtype=torch.uint8)
        with open(entry.file, "rb", buffering=0) as f:
            f.seek(entry.start)
            read_into(self._buffer[: entry.nbytes], f, entry, name)
        return self._buffer[: entry.nbytes].view(entry.dtype).view(entry.shape).to(dtype or entry.dtype)

    def release(self) -> None:
        """Free the host buffer; a later read makes a new one."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of every tensor's name, shape and first 4 KB; the same however it is sharded."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.shape}".encode())
            with open(entry.file, "rb", buffering=0) as f:
                f.seek(entry.start)
                digest.update(f.read(min(4096, entry.nbytes)))
        return digest.hexdigest()[:16]


def read_into(buffer: torch.Tensor, f: FileIO, entry: Entry, name: str) -> None:
    """Fill a buffer, uint8 on the CPU, from where the file stands. Raises ValueError if the file ends before."""
    target, done = buffer.numpy().data, 0
    while done < len(target):  # one read returns 2 GB at most
        count = f.readinto(target[done:])
        if not count:
            raise ValueError(f"{entry.file} ends inside {name}: download it again")
        done += count


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(_is_file_name(name) for name in names.values()):
            raise ValueError(f"{index} is damaged: its weight_map must give a file of this folder for each tensor")
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names: download it again")
        return files
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded: refused. "
            "Take a safetensors version of the model, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    raise FileNotFoundError(f"{folder} has a config but no weights: model.safetensors is missing")


def _is_file_name(name: object) -> bool:
    """Whether it names a file beside the index, and nothing elsewhere on the disk."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\")


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = info["data_offsets"]
            entry = Entry(file, _DTYPES[info["dtype"]], tuple(info["shape"]), 8 + length + start, end - start)
            count = torch.Size(entry.shape).numel()
            if start < 0 or entry.nbytes != count * entry.dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name} does not fit")
            entries[name] = entry
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from None
