"""Types: mypy over every file of the package, with a list of those that are not clean yet, and the marker for users."""

import os
import sys
import tomllib

import pytest
import typing_list

# what other versions and Pythons bring as types differs, and so would the list
LISTED_FOR = (3, 11)


@pytest.mark.skipif(sys.version_info[:2] != LISTED_FOR, reason="the list is that of Python 3.11")
@pytest.mark.skipif(bool(os.environ.get("CONSTRAINTS")), reason="the list is that of the newest versions")
def test_mypy_finds_nothing_outside_the_list_and_something_in_each_file_on_it():
    assert typing_list.complaints(typing_list.errors(), typing_list.listed()) == []


def test_the_list_is_sorted_and_names_files_that_are_there():
    names = typing_list.listed()
    assert names == sorted(set(names)) and all((typing_list.ROOT / name).is_file() for name in names)


def test_the_list_may_only_shrink():
    assert typing_list.listed() == []


def test_a_planted_error_is_found():
    found = typing_list.by_file(
        "nbhelpers/a.py:3: error: No  [arg-type]\nnbhelpers/a.py:3: note: why\nb/c.py:1:2: error: x"
    )
    assert found == {"nbhelpers/a.py": ["nbhelpers/a.py:3: error: No  [arg-type]"], "b/c.py": ["b/c.py:1:2: error: x"]}
    wrong = typing_list.complaints(found, ["b/c.py", "d.py"])
    assert wrong == [
        "nbhelpers/a.py:3: error: No  [arg-type]",
        "d.py is clean: take it off not_yet_typed.txt (--write does)",
    ]


def test_the_package_says_that_it_has_types():
    """py.typed (PEP 561) is beside the package's front door, and what is installed from a wheel has it too."""
    assert (typing_list.ROOT / "nbhelpers" / "py.typed").is_file()
    settings = tomllib.loads((typing_list.ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["nbhelpers"]
