"""Where files go on Colab and on Kaggle, which are made up here; nothing changes elsewhere."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nbhelpers import gpu, host, session


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=int(12.5e9)))

    def at(name: str) -> None:
        monkeypatch.setattr(host, "where", lambda: name)

    return at


@pytest.fixture
def mounted(monkeypatch):
    """A google.colab.drive, and where it was mounted."""
    seen: list[str] = []
    module = ModuleType("google.colab.drive")
    module.mount = seen.append
    for name, made in (("google", ModuleType("google")), ("google.colab", ModuleType("google.colab"))):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setitem(sys.modules, "google.colab.drive", module)
    return module, seen


def test_elsewhere_nothing_happens_but_a_word(place, capsys, mounted):
    place("local")
    assert session.drive("runs/a", mount=True) == "runs/a" and session.kaggle("runs/a") == "runs/a"
    one, two = capsys.readouterr().out.splitlines()
    assert one == "not on Colab, so there is no Drive to ask for: files go to runs/a" and two.startswith(
        "not on Kaggle"
    )
    assert mounted[1] == []


def test_a_drive_is_asked_for_only_where_it_is_wanted(place, capsys, mounted):
    place("Colab")
    assert session.drive("runs/a", mount=False) == "runs/a" and mounted[1] == []
    assert "lost with the session: DRIVE = True keeps them" in capsys.readouterr().out
    found = session.drive("runs/a", mount=True)
    assert Path(found) == Path("/content/drive/MyDrive/runs/a") and mounted[1] == ["/content/drive"]
    assert "12.5 GB free there" in capsys.readouterr().out
    assert session.drive(found, mount=True) == found, "the cell run again"
    assert session.kaggle(found) == found


def test_a_drive_that_is_refused_is_a_sentence(place, mounted):
    def refused(where):
        raise ValueError("mount failed: credential propagation was unsuccessful")

    place("Colab")
    mounted[0].mount = refused
    with pytest.raises(host.CannotRun, match=r"not mounted \(ValueError\): run this cell again.*DRIVE = False"):
        session.drive("runs/a", mount=True)


def test_kaggle_says_its_limits(place, capsys, monkeypatch):
    place("Kaggle")
    monkeypatch.setattr(host, "session_left", lambda: 11.5 * 3600)
    card = gpu.Card("Tesla T4", 16 * 10**9, (7, 5))
    monkeypatch.setattr(gpu, "cards", lambda: [card, card])
    found = session.kaggle("runs/a")
    assert Path(found) == Path("/kaggle/working/runs/a")
    said = capsys.readouterr().out
    assert "20 GB" in said and "Save Version" in said and "ends in 11.5 hours" in said and "torchrun" in said
    monkeypatch.setattr(gpu, "cards", lambda: [card])
    assert session.kaggle(found) == found and "torchrun" not in capsys.readouterr().out
