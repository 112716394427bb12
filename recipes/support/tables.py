"""Reading tables of text from files or from the Hub, with clear errors for bad data."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import DatasetDict, load_dataset
from transformers.utils import logging

from hf_lsam_recipes.support.files import check_utf8, explain_missing

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

logger = logging.get_logger("hf_lsam.recipes")


def load_hub(setting: str, name: str, config: str | None, instead: str) -> DatasetDict:
    """
    Load every split of a data set from the Hub, or from the cache.

    Args:
        setting (`str`): The setting with its value, for the error message.
        name (`str`): Name of the data set on the Hub.
        config (`str` or `None`): Its configuration.
        instead (`str`): The settings for local files, for the error message.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:  # the last for a data set that is a script
        raise ValueError(
            f"{setting} could not be loaded from {name} on the Hub ({' '.join(str(error).split())}). Read local files "
            f"with {instead} instead."
        ) from error


def check_file(path: Path, suffixes: Sequence[str]):
    """Raise `ValueError` unless `path` is a file with one of the `suffixes` and, if it is text, in UTF-8."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {', '.join(suffixes)}, which tells its format.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {explain_missing(path)}")
    if path.suffix != ".parquet":
        check_utf8(path)


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """
    Read a file into memory. There is no cache, so changes of the file always take effect.

    Args:
        path (`Path`): A file whose suffix, one of `SUFFIXES`, tells its format.
        columns (`Sequence[str]`): Columns that are read as text, even if they look like numbers.

    Raises:
        ValueError: if the file is missing, empty or malformed.
    """
    check_file(path, SUFFIXES)
    # As text, so that `01` and `true` keep their spelling.
    convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in columns})
    if path.suffix == ".csv":
        parse = pa.csv.ParseOptions(newlines_in_values=True)
    else:
        parse = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    # With one thread, the error about a malformed row has the number of the row.
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
    """Raise `ValueError`, ending in `way_out`, unless `table` (from `source`) has each of `columns` exactly once."""
    for name in columns:
        if table.column_names.count(name) != 1:
            raise ValueError(
                f"{source} must have one column {name!r}, but has {', '.join(table.column_names)}. {way_out}."
            )


def read_texts(source: str, name: str, column: pa.ChunkedArray, keeps_empty: bool) -> list[str]:
    """
    Read a column of text.

    Args:
        source (`str`): Name of the table in messages.
        name (`str`): The name of the column.
        column (`pa.ChunkedArray`): Its rows.
        keeps_empty (`bool`): Whether rows with empty text are used. If so, a warning counts them.

    Raises:
        ValueError: if the value of a row is not text, or if all rows are empty.
    """
    values = column.to_pylist()
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise ValueError(f"{source}, row {row}: column {name!r} must hold text, but holds {value!r}.")
    empty = [row for row, value in enumerate(values, start=1) if not value.strip()]
    if values and len(empty) == len(values):
        raise ValueError(f"{source}: column {name!r} is empty in every row. Check the file, or name another column.")
    # Every process reads the files, but only one warns.
    if empty and keeps_empty and int(os.environ.get("RANK", "0")) == 0:
        rows = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        logger.warning(
            f"{source}: column {name!r} is empty in {len(empty)} of {len(values)} rows ({rows}), which are used "
            "anyway. Remove them if they are not intended."
        )
    return values
