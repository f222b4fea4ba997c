"""The bad inputs of the torture: the tables of the tests of settings, rows, files and models, tried one by one.

Each test says what a bad input must be answered with: a sentence that names it, or a row that is left out by name.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbhelpers import presets
from nbhelpers.models import smoke

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / room) for room in ("training", "tasks", "loader")]

import test_loader_damaged  # noqa: E402
import test_own_data  # noqa: E402
import test_rows  # noqa: E402
import test_settings  # noqa: E402

TRIED = (
    test_settings.test_a_lean_config_refuses_it_before_trl_computes_with_it,
    test_settings.test_a_plain_config_is_refused_before_the_model_is_loaded,
    test_rows.test_what_is_no_data_set_is_named_with_what_to_pass,
    test_rows.test_a_prompt_that_is_none_is_named_with_its_row,
    test_rows.test_an_empty_text_is_no_prompt,
    test_rows.test_a_column_that_trl_would_overwrite_is_named,
    test_rows.test_fewer_rows_than_a_step_takes_are_refused_and_the_advice_works,
    test_own_data.test_unusable_rows_are_named,
    test_own_data.test_bad_files_are_refused_with_the_reason,
    test_own_data.test_a_missing_file_is_named,
    test_own_data.test_a_comma_without_quotes_is_told,
    test_own_data.test_a_quote_that_is_not_closed_is_told_and_swallows_nothing,
    test_own_data.test_nan_is_no_answer,
    test_own_data.test_a_cell_that_is_no_text_is_told,
    test_own_data.test_files_that_cannot_be_read,
    test_loader_damaged.test_broken_json_is_named_with_its_file,
    test_loader_damaged.test_an_index_is_named_and_reaches_no_file_elsewhere,
    test_loader_damaged.test_a_header_that_is_none_is_named,
    test_loader_damaged.test_a_config_without_sense_is_named,
    test_loader_damaged.test_layers_that_the_config_does_not_count,
    test_loader_damaged.test_a_bias_that_the_config_has_no_place_for,
    test_loader_damaged.test_a_number_that_is_none_is_named_with_its_tensor,
    test_loader_damaged.test_no_vocabulary,
    test_loader_damaged.test_a_chat_template_that_fails_or_never_ends,
)


def arguments(test: Callable) -> Iterator[dict[str, Any]]:
    """What pytest would call a test with, of its tables: one dict for each combination of their rows."""
    tables = []
    for mark in vars(test).get("pytestmark", ()):
        if mark.name == "parametrize":
            names = (
                [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
            )
            tables.append([dict(zip(names, row if len(names) > 1 else (row,), strict=True)) for row in mark.args[1]])
    for rows in itertools.product(*tables):
        yield {name: value for row in rows for name, value in row.items()}


def fault(test: Callable, given: dict[str, Any], root: Path) -> str | None:
    """What is wrong with the answer to one bad input; None: it is as the test wants it."""
    root.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_SMOKE", "1")
        fixtures: dict[str, Callable[[], Any]] = {
            "tmp_path": lambda: root,
            "monkeypatch": lambda: patch,
            "folder": lambda: smoke.write(presets.get("qwen2.5-1.5b").architecture, root / "model", seed=1),
        }
        wanted = [name for name in inspect.signature(test).parameters if name not in given]
        try:
            test(**given, **{name: fixtures[name]() for name in wanted})
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # pytest's own are no Exceptions
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _case(test: Callable, given: dict[str, Any]) -> tuple[str, Callable[[Path], str | None]]:
    name = " ".join([test.__name__.removeprefix("test_").replace("_", " "), repr(list(given.values()))[:60]])
    return name, lambda root: fault(test, given, root)


CASES = [_case(test, given) for test in TRIED for given in arguments(test)]
