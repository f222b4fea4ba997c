"""The reader gives what safetensors gives, holds one tensor, and says what is wrong with a damaged file."""

import pytest
import torch
from safetensors.torch import save_file

from nbhelpers.loader.shards import Shards

TENSORS = {
    "a": torch.randn(5, 7),
    "b": torch.randn(33, 64).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.uint8),
    "d": torch.tensor(2.5),
    "e": torch.randn(2, 3).half(),
}


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:]), 1):
        save_file({name: TENSORS[name] for name in part}, folder / f"model-{number}.safetensors")
    index = ",".join(f'"{name}": "model-{1 if name in names[:2] else 2}.safetensors"' for name in names)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {' + index + "}}")
    return folder


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_was_written(layout, request):
    shards = Shards(request.getfixturevalue(layout))
    assert set(shards.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert shards.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert shards.largest == TENSORS["b"].nbytes


def test_one_buffer_serves_all(single):
    shards = Shards(single)
    shards.read("d")
    assert shards.read("a").data_ptr() == shards.read("b").data_ptr()
    shards.release()
    assert torch.equal(shards.read("a"), TENSORS["a"])


def test_the_fingerprint_is_of_the_tensors_not_of_the_files(single, sharded):
    assert Shards(single).fingerprint() == Shards(sharded).fingerprint()
    before = Shards(single).fingerprint()
    save_file(TENSORS | {"a": TENSORS["a"] + 1}, single / "model.safetensors")
    assert Shards(single).fingerprint() != before


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2\.safetensors"):
        Shards(sharded)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:30], lambda b: b"", lambda b: b"\xff" * 64])
def test_a_damaged_file_is_refused(single, damage):
    file = single / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="damaged or cut short"):
        Shards(single)
