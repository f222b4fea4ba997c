"""Errors of this package as a sentence in a real IPython shell; all others as they were, and %tb for both."""

import subprocess
import sys
import textwrap

import pytest
from IPython.core.interactiveshell import InteractiveShell

from nbhelpers import host, session


@pytest.fixture
def shell(monkeypatch, capsys):
    """A real shell with the hook: runs a cell, and gives what it shows."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(colors="nocolor")
    monkeypatch.setattr(session.errors, "_shells", [])
    session.instead_of_tracebacks()

    def run(cell: str) -> str:
        capsys.readouterr()
        assert shell.run_cell(textwrap.dedent(cell)).success == cell.startswith("%tb")
        said = capsys.readouterr()
        return said.out + said.err

    run.shell = shell
    yield run
    InteractiveShell.clear_instance()


CASES = {  # what a reader may do -> the sentence
    "from nbhelpers import presets; presets.get('qwen-1.5b')": "there is no preset 'qwen-1.5b'",
    "from nbhelpers import tasks; tasks.from_file('none.csv')": "none.csv",
    "from nbhelpers import host; host.require('nothing-like-it')": "nothing-like-it is not installed",
    "from nbhelpers import install; install._pip('install', '--no-index', 'not-there')": "pip cannot install this",
    "from nbhelpers.loader import hub; hub.find('./none')": "there is no folder ./none",
    "from nbhelpers import export; export.push('none', 'me/x')": "none is not a folder that export.save",
    "from nbhelpers.rewards import guard\nguard.guard(lambda **_: 1.0)(prompts=['a'], completions=['b'])": "returned a",
    "from nbhelpers.panel import Live; Live().save('x.json', 'm')": "no step was logged yet",
    "from pathlib import Path; from nbhelpers.training import run_folder\n"
    "run_folder.check_writable(Path('/dev/null/run'))": "nothing can be written into output_dir='/dev/null/run'",
    "import tempfile; from pathlib import Path; from nbhelpers.training.run_folder import hold\n"
    "folder = Path(tempfile.mkdtemp())\nwith hold(folder), hold(folder): pass": "is in use by",
    "from nbhelpers.evaluate import Proportion; Proportion.of(3, 2)": "3 of 2 is no proportion",
}


@pytest.mark.parametrize("cell", CASES)
def test_an_error_of_ours_is_a_sentence_and_tb_shows_the_rest(shell, cell):
    said = shell(cell)
    lines = said.strip().splitlines()
    assert CASES[cell] in said and "Traceback" not in said and "-----" not in said, said
    assert len(lines) == 2 and lines[1] == "(%tb shows where it was raised)", said
    whole = shell("%tb")
    assert "Traceback" in whole and "nbhelpers" in whole and CASES[cell].split()[0] in whole


@pytest.mark.parametrize("cell", ["1 / 0", "import json\njson.loads('{')", "{}['a']", "raise ValueError('mine')"])
def test_any_other_error_keeps_its_traceback(shell, cell):
    assert "Traceback" in shell(cell) and "%tb" not in shell(cell)


def test_a_bug_of_ours_keeps_its_traceback(shell):
    said = shell("from nbhelpers import tasks; tasks.messages('?', 1).append(1) or tasks.PROBES.x")
    assert "Traceback" in said
    said = shell("from nbhelpers import presets; presets.get('phi-4').on_card('x')")
    assert "Traceback" in said and "TypeError" in said, "raised in the package, and by no raise of it"


def test_what_the_reader_wrote_is_named_with_its_line(shell):
    said = shell("""
        from nbhelpers.rewards.guard import guard
        import warnings; warnings.simplefilter("ignore")

        def score(completions, **_):
            share = len(completions) / 0
            return [share]

        once = guard(score)
        for _ in range(3):
            once(prompts=["a"], completions=["b"])
    """)
    assert "failed in 3 batches in a row, last with ZeroDivisionError" in said
    assert "Line 5 of that cell: share = len(completions) / 0" in said and "Traceback" not in said


def test_the_hook_of_somebody_else_still_works_and_ours_is_there_once(shell, monkeypatch):
    seen = []
    shell.shell.set_custom_exc((ImportError,), lambda self, kind, error, trace, tb_offset=None: seen.append(error))
    monkeypatch.setattr(session.errors, "_shells", [])
    session.instead_of_tracebacks()
    session.instead_of_tracebacks()  # the install cell run again
    assert shell("import nothing_like_it") == "" and len(seen) == 1
    assert "not installed" in shell("from nbhelpers import host; host.require('nothing-like-it')") and len(seen) == 1


def test_a_kernel_that_runs_the_install_cell_has_it(tmp_path):
    """In ipykernel, as in Jupyter: the error message of the protocol holds the sentence, and the cell failed."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    cells = ["from nbhelpers import install\ninstall.run()", "from nbhelpers import presets\npresets.get('x')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (error,) = notebook.cells[1].outputs
    assert error.output_type == "error" and error.ename == "ValueError"
    assert error.traceback[0].startswith("there is no preset 'x'") and len(error.traceback) == 2


def test_a_plain_python_has_no_hook():
    code = "from nbhelpers import session, presets; session.instead_of_tracebacks(); presets.get('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "IPython" not in done.stderr


def test_errors_that_render_themselves_do_so_without_the_hook_too():
    assert host.CannotRun("too little")._render_traceback_() == ["too little"]
