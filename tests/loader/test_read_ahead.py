"""Reading ahead: the bytes of the tensors in their order, whatever the pieces, and a thread that always ends."""

import pytest
import torch
from safetensors.torch import save_file

from nbhelpers import loader
from nbhelpers.loader import read_ahead, stream
from nbhelpers.loader.read_ahead import ReadAhead
from nbhelpers.loader.shards import Shards

CPU = torch.device("cpu")
TENSORS = {
    "a": torch.randn(5, 7), "b": torch.randn(33, 64).to(torch.bfloat16), "c": torch.arange(6, dtype=torch.uint8),
    "d": torch.tensor(2.5), "e": torch.randn(2, 3).half(), "f": torch.empty(0, 4),
}  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Shards(tmp_path)


@pytest.mark.parametrize("piece", [7, 64, 10_000])
def test_what_is_taken_is_what_was_written(shards, piece, monkeypatch):
    monkeypatch.setattr(read_ahead, "PIECE", piece)
    monkeypatch.setattr(read_ahead, "LEAST", 3)  # two readers for most
    names = ["b", "a", "f", "d", "c"]  # not the order of the file, and not all
    with ReadAhead(shards, names, CPU) as ahead:
        taken = {name: ahead.take(name) for name in names}
    assert not ahead._thread.is_alive()
    for name, tensor in taken.items():  # none lives in a buffer
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


def test_a_file_that_ends_too_early_is_said_where_the_tensor_is_taken(shards, monkeypatch):
    monkeypatch.setattr(read_ahead, "PIECE", 100)
    monkeypatch.setattr(read_ahead, "LEAST", 10)
    entry = shards.entries["b"]
    with open(entry.file, "r+b") as f:
        f.truncate(entry.start + 1000)
    with ReadAhead(shards, ["b"], CPU) as ahead, pytest.raises(ValueError, match="ends inside b: download it again"):
        ahead.take("b")
    entry.file.unlink()
    with ReadAhead(shards, ["a"], CPU) as ahead, pytest.raises(FileNotFoundError):
        ahead.take("a")
    assert not ahead._thread.is_alive()


def test_whoever_stops_early_leaves_no_thread(shards, monkeypatch):
    monkeypatch.setattr(read_ahead, "PIECE", 10)
    with pytest.raises(KeyboardInterrupt), ReadAhead(shards, list(TENSORS), CPU) as ahead:
        ahead.take("a")
        raise KeyboardInterrupt
    assert not ahead._thread.is_alive()
    with ReadAhead(shards, ["a", "b"], CPU) as ahead, pytest.raises(KeyError, match="out of order"):
        ahead.take("b")
    with ReadAhead(shards, ["a"], CPU) as ahead:
        ahead.take("a")
        with pytest.raises(KeyError, match="out of order"):
            ahead.take("a")


def test_without_pinned_memory_a_checkpoint_is_read_all_the_same(shards, monkeypatch):
    empty, asked = torch.empty, []

    def refused(*size, pin_memory=False, **options):
        if pin_memory:
            asked.append(size)
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **{**options, "device": CPU} if "device" in options else options)

    monkeypatch.setattr(torch, "empty", refused)
    with ReadAhead(shards, ["a", "b"], torch.device("cuda")) as ahead:
        assert torch.equal(ahead.take("a"), TENSORS["a"]) and torch.equal(ahead.take("b"), TENSORS["b"])
    assert len(asked) == read_ahead.BUFFERS


def test_many_small_tensors_share_a_piece(tmp_path, monkeypatch):
    """A packed base has six a layer: none has a turn between two threads for itself."""
    save_file({f"t{i}": torch.full((i + 1,), i, dtype=torch.uint8) for i in range(200)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(read_ahead, "PIECE", 1000)
    monkeypatch.setattr(read_ahead, "LEAST", 100)
    pieces, put = [], read_ahead.ReadAhead._next
    monkeypatch.setattr(read_ahead.ReadAhead, "_next", lambda self: pieces.append(put(self)))
    shards = Shards(tmp_path)
    with ReadAhead(shards, list(shards.entries), CPU) as ahead:
        for name in shards.entries:
            tensor = ahead.take(name)
            assert tensor.tolist() == [int(name[1:])] * (int(name[1:]) + 1)
    assert len(pieces) == -(-sum(range(201)) // 1000)


@pytest.mark.parametrize("quantization", ["nf4", "dynamic", "none", "kept"])
def test_a_model_read_ahead_is_the_model(folder, tmp_path, quantization, monkeypatch):
    """As where the device is a card, from 16 bits and from a packed copy."""
    options = {"lora_rank": 2, "progress": False, "quantization": quantization}
    if quantization == "kept":
        options["quantization"] = None
        loader.keep(*loader.load(folder, **options | {"quantization": "nf4"}), tmp_path / "kept")
        folder = tmp_path / "kept"
    wanted, _ = loader.load(folder, **options)
    in_order, taken, take = stream._in_order, [], ReadAhead.take

    def of_a_card(*arguments):
        return in_order(*arguments[:-1], torch.device("cuda"))

    def counted(self, name, *where):
        taken.append(name)
        return take(self, name, *where)

    monkeypatch.setattr(stream, "_in_order", of_a_card)
    monkeypatch.setattr(ReadAhead, "take", counted)
    monkeypatch.setattr(read_ahead, "PIECE", 1000)
    got, _ = loader.load(folder, **options)
    assert len(taken) > 10 and len(set(taken)) == len(taken)
    for (name, a), (other, b) in zip(wanted.named_parameters(), got.named_parameters(), strict=True):
        assert name == other and ("lora_" in name or (a.dtype == b.dtype and torch.equal(a, b))), name
