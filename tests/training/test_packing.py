"""How the host packs a batch. What it packs: test_packed_attention.py, test_rows.py."""

import pytest
import torch

from nbhelpers.training import packing


def test_the_host_works_on_one_thread_and_gets_the_others_back():
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)

    @packing.on_one_thread
    def work(fails):
        seen.append(torch.get_num_threads())
        return 1 // (not fails)

    try:
        assert work(False) == 1 and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            work(fails=True)
        assert torch.get_num_threads() == 2 and seen == [1, 1]
        assert packing.unpad.__wrapped__ and packing.pack.__wrapped__
    finally:
        torch.set_num_threads(before)
