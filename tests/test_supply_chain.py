"""What others' code this project takes: by commit where that can be, and never a pickle or code from a repository."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
SOURCES = sorted([*(ROOT / "nbhelpers").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")])


@pytest.mark.parametrize("file", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda file: file.name)
def test_actions_are_commits_and_may_only_read(file):
    text = file.read_text()
    used = re.findall(r"uses: *(\S+)(.*)", text)
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) and "# v" in tag for name, tag in used)
    assert re.search(r"^permissions:\n  contents: read$", text, re.M)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")


def test_a_release_is_a_tag_and_its_commit_or_neither():
    build = pytest.importorskip("build", reason="jupytext is a development tool")
    assert bool(build.RELEASE) == bool(build.COMMIT)
    assert re.fullmatch(r"(v\d+\.\d+\.\d+)?", build.RELEASE) and re.fullmatch(r"([0-9a-f]{40})?", build.COMMIT)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_opens_a_pickle_or_runs_text(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in (
                "eval",
                "exec",
                "compile",
                "os.system",
                "torch.load",
                "yaml.load",
                "pandas.read_pickle",
            )
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell"):
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False
