"""The rows of a file, csv, json, jsonl or parquet, with their line numbers: as much of it as is asked for, no more."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nbhelpers.rewards.answers import written

from .texts import MOST_CHARACTERS, TOO_LONG, as_stored

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
_MOST_BYTES = 2e9  # of a parquet file's row group, unpacked
Rows = Iterable[tuple[int, dict]]  # each with its number


def read(path: Path, wanted: Sequence[str]) -> tuple[Rows, list[str]]:
    """The rows of a file with the columns in `wanted`, each with its number, the first being 1; and all its columns.

    Raises FileNotFoundError, and ValueError for another kind of file or a broken one, with the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {path.resolve().parent}): check DATA")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is not a .csv, .jsonl, .json or .parquet file: save your questions as one of these")
    if suffix == ".parquet":
        return _parquet(path, wanted)
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Excel writes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): save it again with the encoding UTF-8"
        ) from None
    if suffix == ".csv":
        return _csv(path, text, wanted)
    parsed: Rows
    if suffix == ".jsonl":
        parsed = ((i, _parse(path, i, line, dict)) for i, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        parsed = enumerate(_parse(path, 1, text, list) if text.strip() else [], 1)
    names: set[str] = set()
    rows = []
    for number, row in parsed:
        names.update(row)
        rows.append((number, {name: row.get(name) for name in wanted}))
    return rows, sorted(names)


def check_twice(source: str | Path, wanted: Iterable[str], names: Iterable[str | None]) -> None:
    """Raises ValueError if one of the `wanted` columns is there twice: which one is meant, nobody knows."""
    counts = Counter(names)
    for name in wanted:
        if counts[name] > 1:
            raise ValueError(f"{source} has {counts[name]} columns called {name!r}: rename or delete all but one")


def _csv(path: Path, text: str, wanted: Sequence[str]) -> tuple[Rows, list[str]]:
    """Strict: a quote that nobody closes is an error; else all that follows would silently become one text."""
    delimiter = _delimiter(text, wanted)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True, delimiter=delimiter)
    rows: list[tuple[int, dict]] = []
    begun, limit = 1, csv.field_size_limit(max(len(text), 1))  # csv's own is 131,072 characters a cell
    try:
        names = list(reader.fieldnames or [])
        check_twice(path, wanted, names)
        begun = reader.line_num + 1
        kept = {*wanted, None}  # None: where csv.DictReader puts what is left of a row
        for row in reader:
            cells = {name: cell for name, cell in row.items() if name in kept}
            for name in wanted:
                if isinstance(cells.get(name), str):
                    cells[name] = written(cells[name])  # all are text here, pandas' 1e-05 too
            rows.append((reader.line_num, cells))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, the row that begins in line {begun}: {error}. Is there a quote that is not closed? Quotes stand "
            'around a whole text, and one within it is written twice: "say ""hi"" to"'
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows, names


def _delimiter(text: str, wanted: Sequence[str]) -> str:
    """What stands between the columns: the comma, unless only ; (Excel in Europe) or a tab gives those in `wanted`."""
    head = text.partition("\n")[0].strip("\r")
    for delimiter in (",", ";", "\t"):
        names = next(csv.reader([head], skipinitialspace=True, delimiter=delimiter), [])
        if set(wanted) <= set(names):
            return delimiter
    return ","


def _parquet(path: Path, wanted: Sequence[str]) -> tuple[Rows, list[str]]:
    import pyarrow
    from pyarrow import parquet

    def broken(error: Exception) -> ValueError:
        return ValueError(f"{path} cannot be read as Parquet: {error}")

    try:
        schema = parquet.read_schema(path)
        texts = [field.name for field in schema if field.name in wanted and pyarrow.types.is_string(field.type)]
        # as a dictionary: a text that stands in a thousand rows is in memory once
        file = parquet.ParquetFile(path, read_dictionary=texts)
    except (pyarrow.ArrowException, OSError) as error:
        raise broken(error) from None
    check_twice(path, wanted, schema.names)
    largest = max((file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)), default=0)
    if largest > _MOST_BYTES:
        raise ValueError(f"{path} unpacks to {largest / 1e9:.1f} GB at a time: save it again with smaller row groups")

    def rows() -> Iterator[tuple[int, dict]]:
        number = 0
        names = [name for name in dict.fromkeys(wanted) if name in schema.names]
        try:
            for batch in file.iter_batches(batch_size=100, columns=names, use_threads=False):
                cells = {name: _cells(batch.column(name)) for name in names}
                for _ in range(batch.num_rows):
                    number += 1
                    yield number, {name: next(column) for name, column in cells.items()}
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(error) from None

    return (rows() if file.metadata.num_rows else []), schema.names


def _cells(column: Any) -> Iterator[Any]:
    """The cells of a pyarrow column, `TOO_LONG` for a text that is."""
    import numpy
    import pyarrow
    from pyarrow import compute

    if pyarrow.types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary).take(column.indices).to_pylist()
        for value, length in zip(column, lengths, strict=True):
            yield TOO_LONG if length is not None and length > 4 * MOST_CHARACTERS else value.as_py()
        return
    # as a Python float 9.11 in float32 would have 16 digits
    kind = {pyarrow.float32(): numpy.float32, pyarrow.float16(): numpy.float16}.get(column.type)
    for value in column:
        cell = value.as_py()
        yield cell if kind is None or cell is None else kind(cell)


def _parse(path: Path, line: int, text: str, wanted: type) -> Any:
    """The JSON of a line (an object: `wanted` is dict) or of a whole file (a list of objects); its numbers are text."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(items)
        if len(row) < len(items):
            check_twice(f"{path}, line {line}," if wanted is dict else path, row, (name for name, _ in items))
        return row

    try:
        value = json.loads(text, parse_int=str, parse_float=as_stored, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}): {text[:60]!r}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: JSON that is nested too deeply to be read: {text[:60]!r}") from None
    name = "a list of objects" if wanted is list else "an object"
    rows = value if isinstance(value, list) else [value]
    if not isinstance(value, wanted) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path}, line {line}: {name} is wanted, like {{"question": "...", "answer": "..."}}: {text[:60]!r}'
        )
    return value
