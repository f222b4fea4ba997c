"""Rows from wherever they are: a file, a folder with one file a split, a pandas frame, or the hub.

Nothing that is downloaded is ever run: `datasets` reads data files only.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pandas import DataFrame

from nbhelpers import hub_words

from .files import SUFFIXES, check_twice, read

_OTHER_FILES = (".txt", ".tsv", ".xlsx", ".xls")  # refused by name, not looked for on the hub
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Rows, where they are from, and how they are counted.

    Args:
        rows (`Iterable[tuple[int, dict]]`): Each with its number, the first being 1.
        name (`str`): What a person calls the place.
        unit (`str`): What the numbers count, "row" or "line".
    """

    rows: Iterable[tuple[int, dict]]
    name: str
    unit: str = "row"


def open_source(
    source: "str | Path | DataFrame",
    columns: Sequence[str],
    *,
    config: str | None = None,
    split: str = "train",
    stream: bool = False,
) -> Source:
    """The rows of a source, once it is clear that it has `columns`.

    Args:
        source (`str`, `Path` or `pandas.DataFrame`): A .csv, .jsonl, .json or .parquet file, a folder with a file
            `split` of one of these kinds, a frame, or a hub id (owner/name).
        columns (`Sequence[str]`): Those that must be there.
        config (`str`, *optional*), split (`str`): Which part of a hub data set.
        stream (`bool`): Of a hub data set fetch only as many rows as are read.

    Raises FileNotFoundError, ValueError (another kind of file, broken JSON or CSV, a missing column), TypeError for
    what is no source at all, and ConnectionError if the hub is out of reach.
    """
    if not isinstance(source, (str, Path)):
        return _frame(source, columns)
    path = Path(source).expanduser()
    if path.is_dir():
        path = _in_folder(path, split)
    elif isinstance(source, str) and not path.exists() and _is_hub_id(source):
        return _hub(source, columns, config, split, stream)
    rows, names = read(path, columns)
    if not rows:
        raise ValueError(f"{path} is empty: one question and answer a line are needed")
    check_columns(path, columns, names)
    return Source(rows, path.name, "line" if path.suffix.lower() in (".csv", ".jsonl") else "row")


def check_columns(source: str | Path, wanted: Sequence[str], names: Iterable[str | None]) -> None:
    """Raises ValueError unless `wanted` are among the column `names`; it says what is missing and what there is.

    A name that is None is csv.DictReader's place for what is left of a row, and no column.
    """
    columns = [str(name) for name in names if name is not None]
    check_twice(source, wanted, columns)
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, columns))}."
            ' Rename its columns, or tell tasks.from_data which they are: question="...", answer="..."'
        )


def _is_hub_id(source: str) -> bool:
    is_file_name = source.startswith(".") or Path(source).suffix.lower() in (*SUFFIXES, *_OTHER_FILES)
    return bool(_HUB_ID.fullmatch(source)) and not is_file_name


def _in_folder(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    files = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(f"{folder} has no {split}.jsonl, .json, .parquet or .csv; it has {files}")


def _frame(frame: "DataFrame", columns: Sequence[str]) -> Source:
    import numpy
    import pandas

    if not isinstance(frame, pandas.DataFrame):
        raise TypeError(f"a file, a folder, a hub id or a pandas.DataFrame is wanted, not a {type(frame).__name__}")
    check_columns("the frame", columns, frame.columns)
    names = list(dict.fromkeys(columns))
    # numpy's own numbers, not to_dict's: as a Python float 9.11 in float32 would have 16 digits
    cells = [zip(frame[name].array, frame[name].isna(), strict=True) for name in names]
    rows = [
        {name: None if missing else cell for name, (cell, missing) in zip(names, row, strict=True)}
        for row in zip(*cells, strict=True)
    ]
    # pandas.read_parquet makes arrays of lists
    rows = [{k: cell.tolist() if isinstance(cell, numpy.ndarray) else cell for k, cell in row.items()} for row in rows]
    return Source(list(enumerate(rows, 1)), "the frame")


def _hub(name: str, columns: Sequence[str], config: str | None, split: str, stream: bool) -> Source:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    part = f'"{name}"' + (f', "{config}"' if config else "") + f', split="{split}"'
    in_use = hub_words.token_in_use(None)
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=stream)
    except (FileNotFoundError, ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise hub_words.refusal(
            "data set", name, _what_the_hub_says(name, error), has_token=in_use is not None, pass_token="set HF_TOKEN",
            copy=f"pass a copy instead of the name: a folder that holds {split}.parquet, .jsonl or .csv",
        ) from None  # fmt: skip
    except ValueError as error:  # no such config, no such split: datasets names those that there are
        raise ValueError(f"load_dataset({part}): {error}") from None
    if dataset.column_names is not None:  # unknown before the first row of some streams
        check_columns(name, columns, dataset.column_names)
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    return Source(_checked(dataset, name, columns), name)


def _what_the_hub_says(name: str, error: Exception) -> Exception:
    """The hub's own refusal, asked for once more: `datasets` says of most that it cannot find the files."""
    import huggingface_hub

    if hub_words.status(error) is not None or huggingface_hub.constants.HF_HUB_OFFLINE:
        return error
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except Exception as refusal:
        return refusal
    return error


def _checked(rows: "Dataset | IterableDataset", name: str, columns: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The rows numbered from 1, once the first has shown its columns."""
    import numpy

    # as a Python float 9.11 in float32 would have 16 digits
    kinds = {column: getattr(feature, "dtype", None) for column, feature in (rows.features or {}).items()}
    short = [column for column, kind in kinds.items() if kind in ("float16", "float32")]
    for number, row in enumerate(rows, 1):
        if number == 1:
            check_columns(name, columns, row)
        numbers = {column: numpy.dtype(kinds[column]).type(row[column]) for column in short if row[column] is not None}
        yield number, row | numbers
