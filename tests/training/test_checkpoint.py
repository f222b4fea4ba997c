"""A checkpoint's folder is complete or not there: damage is found, steps say which is newest, old ones leave."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbhelpers.training import checkpoint


def publish(root: Path, step: int, text: str = "numbers", start: int = 0, run: str = "a") -> Path:
    staged = checkpoint.staging(root) / f"checkpoint-{step}"
    (staged / "below").mkdir(parents=True)
    (staged / "weights").write_text(text)
    (staged / "below" / "more").write_text(text)
    checkpoint.publish(staged, root / staged.name, {"name": run}, step, start)
    return root / staged.name


def test_damage_is_found_named_and_skipped(tmp_path, capsys):
    good = publish(tmp_path, 1)
    for step, hurt, why in [
        (2, lambda f: (f / "weights").write_text("numbert"), "weights is damaged"),
        (3, lambda f: (f / "below" / "more").unlink(), "below/more is missing"),
        (4, lambda f: (f / "weights").write_text("num"), "weights has 3 bytes instead of 7"),
        (5, lambda f: (f / "manifest.json").write_text('{"fi'), "its manifest.json cannot be read"),
        (6, lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    ]:
        folder = publish(tmp_path, step)
        hurt(folder)
        assert why in checkpoint.problem(folder)
        assert checkpoint.newest(tmp_path) == good
        assert f"checkpoint-{step} is skipped: {why}" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_the_newest_by_start_and_step_counts_and_old_ones_leave(tmp_path, monkeypatch):
    clock = iter(range(2_000_000_000, 0, -1_000_000))  # set back before every checkpoint
    monkeypatch.setattr(checkpoint.time, "time", lambda: next(clock))
    assert checkpoint.next_start(tmp_path) == 0
    publish(tmp_path, 500)  # of an earlier start in the same folder
    assert checkpoint.next_start(tmp_path) == 1
    for step in (10, 20, 30):
        publish(tmp_path, step, start=1)
    assert checkpoint.next_start(tmp_path) == 2
    (tmp_path / "checkpoint-7").mkdir()  # somebody else's
    assert checkpoint.newest(tmp_path).name == "checkpoint-30"
    checkpoint.rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-500"))
    left = {"checkpoint-500", "checkpoint-20", "checkpoint-30", "checkpoint-7"}
    assert {path.name for path in tmp_path.iterdir()} == left
    for everything in (None, 0, -1):
        checkpoint.rotate(tmp_path, everything)
        assert {path.name for path in tmp_path.iterdir()} == left
    (tmp_path / "checkpoint-20" / "manifest.json").write_text('{"fi')  # damaged: no reason to fail in the next save
    checkpoint.rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-30", "checkpoint-7"}


def test_a_drive_that_cannot_sync_folders_will_do_but_files_must_be_written(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(folders: bool):
        def refuse(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode) is folders:
                raise OSError("Invalid argument")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", refuse)

    refusing(folders=True)
    assert checkpoint.problem(publish(tmp_path, 1)) is None
    refusing(folders=False)
    with pytest.raises(OSError, match="Invalid argument"):
        publish(tmp_path, 2)
    assert checkpoint.newest(tmp_path).name == "checkpoint-1"


def test_another_run_s_checkpoints_are_spared_and_its_name_is_not_taken(tmp_path, capsys):
    for step in (3, 6):
        publish(tmp_path, step, "first", run="one")
    for step in (2, 4, 6, 8):
        publish(tmp_path, step, "second", start=1, run="two")
        checkpoint.rotate(tmp_path, 2, run={"name": "two"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-3", "checkpoint-6", "checkpoint-6-earlier-1", "checkpoint-8",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-6-earlier-1" / "weights").read_text() == "first"
    assert "checkpoint-6 of another run is kept as checkpoint-6-earlier-1" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path).name == "checkpoint-8"
    assert checkpoint.others(tmp_path, {"name": "two"}) == [
        tmp_path / "checkpoint-3",
        tmp_path / "checkpoint-6-earlier-1",
    ]


def test_one_flipped_bit_in_a_manifest_never_ends_a_session(tmp_path):
    """It is harmless, or the checkpoint before is taken: whatever bit it is."""
    good, hurt = publish(tmp_path, 1), publish(tmp_path, 2)
    file = hurt / "manifest.json"
    whole = file.read_bytes()
    for i in range(0, 8 * len(whole), 11):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        file.write_bytes(flipped)
        found = checkpoint.newest(tmp_path)
        assert found == good or (found == hurt and checkpoint.read(hurt)["run"] == {"name": "a"})
        checkpoint.rotate(tmp_path, 5)


def test_weights_that_are_not_finite_are_skipped_by_name(tmp_path, capsys):
    good = publish(tmp_path, 1)
    staged = checkpoint.staging(tmp_path) / "checkpoint-2"
    staged.mkdir()
    save_file({"fine": torch.ones(3), "head": torch.tensor([1.0, torch.nan])}, staged / "adapter_model.safetensors")
    checkpoint.publish(staged, tmp_path / "checkpoint-2", {"name": "a"}, 2)
    assert checkpoint.newest(tmp_path) == good
    said = "its weights are not finite (head in adapter_model.safetensors)"
    assert said in capsys.readouterr().out


def test_a_kill_just_before_the_rename_is_made_good(tmp_path, monkeypatch):
    publish(tmp_path, 1)
    staged = checkpoint.staging(tmp_path) / "checkpoint-2"
    staged.mkdir()
    (staged / "weights").write_text("x")
    with monkeypatch.context() as m, pytest.raises(InterruptedError):
        m.setattr(checkpoint, "_put", lambda *_: (_ for _ in ()).throw(InterruptedError))
        checkpoint.publish(staged, tmp_path / "checkpoint-2", {}, 2)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-2"
    assert not staged.exists()


def test_a_position_comes_back_as_it_was(tmp_path):
    block = torch.arange(12.0).reshape(4, 3)
    rollout = [
        {"ids": block[:2], "none": None, "n": torch.tensor(5)},
        {"ids": block[2:], "none": None, "n": block[0, 1]},
    ]
    checkpoint.Position(7, rollout, {"skipped": 2}).save(tmp_path, 1)
    found = checkpoint.Position.load(tmp_path, 1, "cpu")
    assert found.micro_step == 7 and found.counters == {"skipped": 2} and found.rng is None
    for one, two in zip(found.rollout, rollout, strict=True):
        assert list(one) == list(two) and one["none"] is None
        assert all(torch.equal(one[name], two[name]) for name in ("ids", "n"))


def test_the_state_of_hooks_comes_back_exactly_and_what_cannot_is_refused(tmp_path):
    extra = {"signal": {"silent": [1, 2.5, None, True], "rate": 0.1 + 0.2, "big": 2**70}, "name": "größer", "none": {}}
    checkpoint.Position(1, None, {}, extra).save(tmp_path, 0)
    loaded = checkpoint.Position.load(tmp_path, 0, "cpu")
    assert loaded.extra == extra and type(loaded.extra["signal"]["rate"]) is float and loaded.rollout is None
    for wrong in ({"pair": (1, 2)}, {"step": {3: 1}}, {"mean": float("nan")}):
        with pytest.raises(ValueError, match="is not JSON"):
            checkpoint.Position(1, None, {}, wrong).save(tmp_path, 0)
