"""Tables of text, from files or from the Hub, with one clear error for what is wrong with them."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import DatasetDict, load_dataset

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


def load_hub(setting: str, name: str, config: str | None, instead: str) -> DatasetDict:
    """
    Every split of a data set on the Hub, or in the cache.

    Raises:
        ValueError: naming the `setting`, and the one that reads files `instead`, if it cannot be loaded.
    """
    try:
        return load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:  # the last for a data set that is a script
        raise ValueError(
            f"{setting} could not be loaded from {name} on the Hub ({' '.join(str(error).split())}). Read local files "
            f"with {instead} instead."
        ) from error


def check_file(path: Path, suffixes: Sequence[str]):
    """Raise `ValueError` unless `path` is a file of one of the `suffixes`."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {', '.join(suffixes)}, to say what it holds.")
    if not path.is_file():
        raise ValueError(f"{path} is no file: check the path.")


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """
    Read a file straight into memory: no cache that a changed file could disagree with.

    Args:
        path (`Path`): A file, whose suffix says what it holds.
        columns (`Sequence[str]`): Columns of text.
    """
    check_file(path, SUFFIXES)
    # Read as text, `01` or `true` stay what they are.
    convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in columns})
    if path.suffix == ".csv":
        parse = pa.csv.ParseOptions(newlines_in_values=True)
    else:
        parse = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    # With one thread, the message about a malformed row has its number.
    read = pa.csv.ReadOptions(use_threads=False)
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
        elif path.suffix == ".jsonl":
            table = pa.json.read_json(path)
        else:
            table = pa.csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}.") from error
    if table.num_rows == 0:
        raise ValueError(f"{path} holds no example.")
    return table


def check_columns(source: str, table: pa.Table, columns: Sequence[str], way_out: str):
    """Raise `ValueError`, with the `way_out`, unless `table` has each of the columns once."""
    for name in columns:
        if table.column_names.count(name) != 1:
            raise ValueError(
                f"{source} must have one column {name!r}, but has {', '.join(table.column_names)}. {way_out}."
            )


def read_texts(source: str, name: str, column: pa.ChunkedArray) -> list[str]:
    """The column `name`, each row of which must be text."""
    values = column.to_pylist()
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise ValueError(f"{source}, row {row}: column {name!r} must hold text, but holds {value!r}.")
    return values
