"""Tables of text, from files or from the Hub, with one clear error for what is wrong with them."""

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
    """Raise `ValueError` unless `path` is a file of one of the `suffixes`, in UTF-8 where it is text."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {', '.join(suffixes)}, to say what it holds.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {explain_missing(path)}")
    if path.suffix != ".parquet":
        check_utf8(path)


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


def read_texts(source: str, name: str, column: pa.ChunkedArray, keeps_empty: bool) -> list[str]:
    """
    The column `name`, each row of which must be text.

    Args:
        source (`str`): What messages call the table.
        name (`str`): The column.
        column (`pa.ChunkedArray`): Its rows.
        keeps_empty (`bool`): Whether rows without text are used as they are: a warning counts them.

    Raises:
        ValueError: if a row holds no text at all, but a number or nothing, or if all of them are empty.
    """
    values = column.to_pylist()
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise ValueError(f"{source}, row {row}: column {name!r} must hold text, but holds {value!r}.")
    empty = [row for row, value in enumerate(values, start=1) if not value.strip()]
    if values and len(empty) == len(values):
        raise ValueError(f"{source}: column {name!r} is empty in every row. Check the file, or name another column.")
    # Each process reads the files.
    if empty and keeps_empty and int(os.environ.get("RANK", "0")) == 0:
        rows = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        logger.warning(
            f"{source}: column {name!r} is empty in {len(empty)} of {len(values)} rows ({rows}), which are used as "
            "they are. Remove them unless they are meant."
        )
    return values
