"""Who may take how many of a device's bytes: counted by hand, on cards that are made up."""

import pytest
import torch

from nbhelpers import memory
from nbhelpers.memory import Reserved, Room

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """4 GB are free of 15; torch has reserved 6 and given out 5. It returns the process's share, to change."""
    share = [1.0]
    for name, value in {"mem_get_info": (4e9, 15e9), "memory_reserved": 6e9, "memory_allocated": 5e9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share[0])
    return share


def asleep():
    return Reserved(handed_back=2 * 10**9)


def test_the_room_on_a_card(card):
    """2 of the 5 GB that torch has given out have been handed back by who sleeps."""
    assert Room(CARD).free() == Room(CARD, None, asleep).free() == Room(CARD, 100.0).free() == 5e9
    assert Room(CARD, 7.0).free() == 2e9 and Room(CARD, 7.0, asleep).free() == 4e9
    assert Room(CARD, 3.0).free() == 0
    card[0] = 0.5  # 7.5 GB for this process
    assert Room(CARD).free() == 2.5e9 and Room(CARD, None, asleep).free() == 4.5e9


def test_the_step_leaves_a_reserve_of_the_card_and_none_of_its_budget(card):
    assert Room(CARD).for_step() == 0.95 * 5e9
    assert Room(CARD, 7.0).for_step() == 2e9 and Room(CARD, 9.9).for_step() == 0.95 * 5e9
    coming = Room(CARD, 7.0, lambda: Reserved(2 * 10**9, 5e8))
    assert coming.for_step() == 4e9 - 5e8 and coming.for_step(1e9) == 4e9 - 5e8 - 1e9
    assert Room(CARD, 3.0).for_step(1e9) == -1e9


def test_who_ran_out_of_memory_gets_less_three_times(card):
    room, got = Room(CARD, 7.0), []
    while room.shrink():
        got.append(room.for_step() / 2e9)
    assert got == pytest.approx([0.8, 0.64, 0.512]) and room.share == pytest.approx(0.512)
    assert room.free() == 2e9  # the engines' part is another


def test_on_a_cpu_only_the_budget_counts():
    assert Room(CPU).for_step(1e9) == float("inf")
    assert Room(CPU, 0.5).for_step(1e9) == 5e8
    assert Room(CPU).for_keys_and_values() == Room(CPU, 0.5).for_keys_and_values() == 1.4e9


def test_keys_and_values_get_a_share_or_all_but_what_the_engine_needs_beside_them():
    assert [memory.kv_budget(gb * 1e9) for gb in (0, 1, 4.5)] == [0, 0.7e9, 3.7e9]
    assert memory.vllm_kv_budget(5e9) == 3e9
    assert memory.kv_bytes_per_token(28, 2, 128, 2) == 28_672  # Qwen2.5-1.5B
