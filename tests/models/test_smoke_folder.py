"""Smoke models live where no other user of the machine can have put theirs."""

import os
import stat
import tempfile

import pytest

from nbhelpers.models import smoke

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a temporary directory a user")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    smoke._instead.cache_clear()
    yield tmp_path
    smoke._instead.cache_clear()


def test_the_folder_is_this_users_and_closed(temporary):
    folder = smoke._own_folder()
    assert folder == temporary / f"nbhelpers-smoke-{os.getuid()}" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert smoke.make_dataset() == folder / "gsm8k" == smoke.make_dataset()


@pytest.mark.parametrize("planted", ["writable", "link", "of another"])
def test_a_folder_that_others_can_write_to_is_not_used(temporary, planted, monkeypatch):
    folder = temporary / f"nbhelpers-smoke-{os.getuid()}"
    if planted == "link":
        (temporary / "theirs").mkdir()
        folder.symlink_to(temporary / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777 if planted == "writable" else 0o755)
    if planted == "of another":
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        folder.rename(temporary / f"nbhelpers-smoke-{uid + 1}")
    made = smoke.make_dataset()
    assert folder not in made.parents and made.parent == smoke._own_folder() and (made / "train.jsonl").exists()
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
