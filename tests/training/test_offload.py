"""Checkpoints come back as they were put, from the card and from the host, across the borders of its chunks."""

import pytest
import torch

from nbhelpers.training import offload
from nbhelpers.training.offload import Checkpoints

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_comes_back(monkeypatch, dtype):
    monkeypatch.setattr(offload, "CHUNK", 64)  # so that tensors lie across several chunks, and share them
    store, tensors = Checkpoints(CPU), {}
    for key in range(5):
        tensors[key] = torch.randn(1, 7, 3).to(dtype)
        store.put(key, tensors[key], host=key % 2 == 0)
    store.flush()
    for key in (4, 3, 1, 0, 2):
        store.prefetch(key)
        torch.testing.assert_close(store.take(key), tensors[key], rtol=0, atol=0)
    with pytest.raises(KeyError):
        store.take(4)


def test_the_host_has_a_copy_and_the_card_the_tensor_itself():
    store, x = Checkpoints(CPU), torch.randn(1, 4, 2)
    store.put(0, x, host=False)
    store.put(1, x, host=True)
    was = x.clone()
    x.zero_()
    assert store.take(0) is x
    torch.testing.assert_close(store.take(1), was)


def test_a_tensor_that_is_not_contiguous():
    store, x = Checkpoints(CPU), torch.randn(1, 4, 6)[:, :, ::2]
    store.put(0, x, host=True)
    torch.testing.assert_close(store.take(0), x)


def test_memory_of_the_host_is_used_again(monkeypatch):
    monkeypatch.setattr(offload, "CHUNK", 1024)
    store = Checkpoints(CPU)
    for _ in range(3):
        for key in range(4):
            store.put(key, torch.randn(1, 100), host=True)
        assert store.host_bytes() == 2 * 1024  # 1,600 bytes
        store.clear()
    with pytest.raises(KeyError):
        store.take(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_behind_the_work_on_a_gpu():
    """The memory that a tensor leaves is written over at once; what comes back is the tensor all the same."""
    device = torch.device("cuda")
    store, tensors = Checkpoints(device), {}
    for key in range(8):
        x = torch.full((1, 4096, 1024), float(key), device=device)
        store.put(key, x, host=True)
        del x
        tensors[key] = torch.randn(1, 4096, 1024, device=device)
        del tensors[key]
    store.flush()
    for key in reversed(range(8)):
        store.prefetch(key - 1 if key else 0)
        assert (store.take(key) == key).all()
