"""The install cell: with pip faked, and once with the real pip and small wheels made on the spot."""

import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nbhelpers import host, install

ROOT = Path(__file__).parents[1]


class Session:
    """A machine with some packages, some imported, and a pip that would install `plan`."""

    def __init__(self, monkeypatch, place="Colab", installed=(), needs=(), plan=None, requires=None, modules=()):
        self.versions, self.plan, self.calls = dict(installed), plan or {}, []
        self.requires, self.constraints = requires or {}, None
        fake = types.SimpleNamespace(
            requires=lambda name: list(needs), version=self.version, distributions=self.distributions,
            packages_distributions=lambda: {name: [name] for name in self.versions},
            PackageNotFoundError=install.metadata.PackageNotFoundError,
        )  # fmt: skip
        monkeypatch.setattr(install, "metadata", fake)
        monkeypatch.setattr(install.subprocess, "run", self.pip)
        monkeypatch.setattr(host, "where", lambda: place)
        for name in modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def version(self, name):
        if name not in self.versions:
            raise install.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def distributions(self):
        for name, version in self.versions.items():
            yield types.SimpleNamespace(name=name, version=version, requires=self.requires.get(name))

    def pip(self, command, **_):
        self.calls.append(command)
        if "--dry-run" in command:
            self.constraints = Path(command[command.index("--constraint") + 1]).read_text().split()
            if isinstance(self.plan, str):
                return types.SimpleNamespace(returncode=1, stdout="", stderr=self.plan)
            report = Path(command[command.index("--report") + 1])
            rows = [{"metadata": {"name": name, "version": version}} for name, version in self.plan.items()]
            report.write_text(json.dumps({"install": rows}))
            return types.SimpleNamespace(returncode=0, stdout="", stderr="")
        self.versions.update(word.split("==") for word in command if "==" in word)
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")


HERE = {"torch": "2.11.0+cu128", "torchvision": "0.26.0", "numpy": "2.1.3", "peft": "0.20.0"}
NEEDS = ("torch>=2.10,<2.14", "peft>=0.20,<0.22", "nbsome>=1.16,<1.17", 'ruff>=0.14; extra == "dev"')


def test_nothing_is_missing(monkeypatch, capsys):
    session = Session(monkeypatch, installed=HERE, needs=NEEDS[:2])
    install.run()
    assert capsys.readouterr().out == "Colab: everything is installed\n" and not session.calls


def test_what_is_missing_is_installed_and_the_session_kept(monkeypatch, capsys):
    session = Session(monkeypatch, "Kaggle", HERE, NEEDS, plan={"nbsome": "1.16.0", "NB_More": "3.0"})
    install.run()
    out = capsys.readouterr().out
    assert "Kaggle: installing nbsome" in out and "restart" in out and "no restart needed" in out
    assert session.constraints == ["torch==2.11.0+cu128", "torchvision==0.26.0", "numpy==2.1.3"]
    dry, real = session.calls
    assert "--dry-run" in dry and any(word.startswith("nbsome") for word in dry)
    assert not any(word.startswith(("torch", "ruff", "peft")) for word in dry)
    assert "--no-deps" in real and "nbsome==1.16.0" in real and "nb-more==3.0" in real  # what was announced, no more


def test_your_own_machine_is_only_checked(monkeypatch, capsys):
    session = Session(monkeypatch, "local", HERE, NEEDS, plan={"nbsome": "1.16.0"})
    install.run()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "nbsome<1.17,>=1.16" in out and "pip install -e ." in out
    assert '%pip install "nbsome<1.17,>=1.16"; then restart' in out  # a class's JupyterHub has no folder
    assert not session.calls


def test_a_kept_package_of_another_version_stays(monkeypatch, capsys):
    session = Session(monkeypatch, installed=HERE | {"torch": "2.9.0"}, needs=NEEDS[:2])
    install.run()
    assert "torch 2.9.0 is outside the tested range" in capsys.readouterr().out and not session.calls


@pytest.mark.parametrize("imported", [True, False])
def test_a_restart_is_asked_for_only_if_a_changed_package_was_imported(monkeypatch, capsys, imported):
    here = HERE | {"nbsome": "1.10.0"}
    session = Session(monkeypatch, installed=here, needs=NEEDS, plan={"nbsome": "1.16.0", "nbnew": "1.0"},
                      modules=["nbsome", "nbnew"] if imported else [])  # fmt: skip
    if imported:
        with pytest.raises(install.Stop, match=r"restart once \(Runtime.*top: nbsome had been imported") as stop:
            install.run()
        assert stop.value._render_traceback_() == [str(stop.value)]
    else:
        install.run()
        assert "no restart needed" in capsys.readouterr().out
    assert session.versions["nbsome"] == "1.16.0"
    install.run()  # after the restart there is nothing to do
    assert "everything is installed" in capsys.readouterr().out


def test_what_would_break_is_said_before_it_is_done(monkeypatch, capsys):
    requires = {"viewer": ["nbfs==2025.3", "nbfs>=1; extra == 'all'"], "old": ["nbfs<2000"], "fine": ["nbfs>=2025"]}
    here = HERE | {"nbfs": "2025.3", "viewer": "1.0", "old": "1.0", "fine": "1.0"}
    Session(monkeypatch, installed=here, needs=NEEDS, plan={"nbsome": "1.16.0", "nbfs": "2026.1"}, requires=requires)
    install.run()
    out = capsys.readouterr().out
    assert "this changes nbfs 2025.3 to 2026.1\n" in out and "nbsome" not in out.partition("changes")[2]
    assert "warning: viewer 1.0 asks for nbfs==2025.3 and gets 2026.1" in out
    assert out.count("warning") == 1, "old was broken before, fine is not broken"
    assert out.index("warning") < out.index("ready")


def test_a_folder_that_is_not_installed_is_said_plainly(monkeypatch):
    session = Session(monkeypatch, installed=HERE)
    monkeypatch.setattr(install.metadata, "requires", session.version)
    monkeypatch.setattr(install, "REQUIREMENTS", ROOT / "not/there.txt")
    with pytest.raises(install.Stop, match=r"found as a folder and is not installed.*%pip install"):
        install.run()


def test_a_folder_says_itself_what_it_requires(monkeypatch, capsys, tmp_path):
    """A read-only dataset or a zip that was unpacked: nothing is installed of it, and what it requires is."""
    session = Session(monkeypatch, "Kaggle", HERE, plan={"nbsome": "1.16.0"})
    monkeypatch.setattr(install.metadata, "requires", session.version)
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path / "requirements.txt")
    install.REQUIREMENTS.write_text("# why\ntorch>=2.10,<2.14\n\nnbsome>=1.16,<1.17  # for this\n")
    assert [str(need) for need in install.missing()] == ["nbsome<1.17,>=1.16"]
    install.run()
    assert "no restart needed" in capsys.readouterr().out and session.versions["nbsome"] == "1.16.0"


def test_a_dataset_of_wheels_stands_for_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "DATASETS", tmp_path)
    session = Session(monkeypatch, "Kaggle", HERE, NEEDS, plan={"nbsome": "1.16.0"})
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "nbhelpers-1.0-py3-none-any.whl").touch()  # alone it says nothing of the others
    install.planned([Requirement("nbsome")])
    assert not any("--no-index" in call for call in session.calls)
    wheel(tmp_path / "ours", "nbsome", "1.16.0")
    install.run()
    for call in session.calls[1:]:
        assert "--no-index" in call and f"--find-links={tmp_path / 'ours'}" in call


@pytest.mark.parametrize("place", ["Colab", "Kaggle"])
def test_a_failure_is_a_sentence_with_three_ways_out(monkeypatch, place):
    Session(monkeypatch, place, HERE, NEEDS, plan="ERROR: Could not find a version that satisfies nbsome")
    with pytest.raises(install.Stop, match=r"Ways out: .* index, .*; or add a dataset .*; or begin a new") as stop:
        install.run()
    assert "\n" not in str(stop.value)


def test_packages_that_cannot_be_read_stop_nothing(monkeypatch, capsys, tmp_path):
    """What a broken uninstall leaves behind has no name, and old packages ask for versions that are none."""
    (tmp_path / "~bfs-1.0.dist-info").mkdir()
    (tmp_path / "~bfs-1.0.dist-info" / "top_level.txt").write_text("nbfs\n")
    left_behind = list(install.metadata.distributions(path=[str(tmp_path)]))
    assert [package.name for package in left_behind] == [None]
    requires = {"ancient": ["nbfs>dev", "nbfs==2025.3"]}
    here = HERE | {"nbfs": "2025.3", "ancient": "1.0"}
    session = Session(monkeypatch, installed=here, needs=NEEDS, plan={"nbfs": "2026.1"}, requires=requires)
    monkeypatch.setattr(install.metadata, "distributions", lambda: [*left_behind, *session.distributions()])
    monkeypatch.setattr(install.metadata, "packages_distributions", lambda: {"sys": [None]})
    install.run()
    out = capsys.readouterr().out
    assert "warning: ancient 1.0 asks for nbfs==2025.3 and gets 2026.1" in out and "ready" in out


def test_pips_reason_is_one_line(monkeypatch):
    said = "WARNING: x\nERROR: Cannot install a and b.\nERROR: ResolutionImpossible: see https://pip.pypa.io\n"
    session = Session(monkeypatch, installed=HERE, needs=NEEDS, plan=said)
    with pytest.raises(install.Stop, match=r"cannot install this: Cannot install a and b\. \(") as stop:
        install.run()
    assert "\n" not in str(stop.value) and len(session.calls) == 1


# ---- the real pip ----


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    meta = "".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
                    *(f"Requires-Dist: {need}\n" for need in requires)])  # fmt: skip
    files = {
        f"{name}/__init__.py": f"version = {version!r}\n",
        f"{info}/METADATA": meta,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)


def test_with_the_real_pip(tmp_path, monkeypatch):
    """A package whose newest version wants another numpy: an older one is taken, and numpy stays."""
    wheel(tmp_path, "nbhtop", "1.1", "nbhlow>=2")
    wheel(tmp_path, "nbhtop", "1.2", "nbhlow>=2", "numpy>=999")
    wheel(tmp_path, "nbhlow", "2.0")
    wheel(tmp_path, "numpy", "999.0")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("TARGET", "")):
        monkeypatch.setenv(f"PIP_{name}", value)
    assert install.planned([Requirement("nbhtop>=1")]) == {"nbhtop": "1.1", "nbhlow": "2.0"}
    with pytest.raises(install.Stop, match=r"nbhtop 1\.2 depends on numpy>=999"):
        install.planned([Requirement("nbhtop==1.2")])
    for name in ("NO_INDEX", "FIND_LINKS"):  # as without a network: from the wheels of a dataset alone
        monkeypatch.delenv(f"PIP_{name}")
    monkeypatch.setattr(install, "DATASETS", tmp_path.parent)
    assert install.planned([Requirement("nbhtop>=1")]) == {"nbhtop": "1.1", "nbhlow": "2.0"}


def test_it_imports_without_the_packages_that_it_installs():
    code = (
        "import sys; from nbhelpers import install; print([m for m in ('torch', 'numpy', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr
