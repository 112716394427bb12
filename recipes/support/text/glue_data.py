"""The data of `run_glue.py`, from GLUE or from the user's files, checked before a model is built."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from hf_lsam_recipes.support.files import explain_missing
from hf_lsam_recipes.support.tables import SUFFIXES, check_columns, load_hub, read_table, read_texts
from hf_lsam_recipes.support.text.glue_sampling import split_training_data, split_validation_data, with_label_noise
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS, HUB_NAME, STSB_RANGE, DataArguments

COLUMN_SETTINGS = "Set text_column, text_pair_column or label_column"
NEEDED_BY = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}


@dataclass(frozen=True)
class TextData:
    """
    Checked data, ready to tokenize.

    Args:
        labels (`tuple[str, ...]` or `None`): The labels in the order of their ids; `None` for a regression.
        splits (`dict[str, Dataset]`):
            `train`, `validation` and `test` as requested, the last two for MNLI also with `_mismatched`, plus
            `calibration` if `calibration_fraction` is set and `shift_<name>` for each of `shift_files`. The columns
            are `text`, for pairs `text_pair`, and `label` (a class id or a number), which `test` may lack.
    """

    labels: tuple[str, ...] | None
    splits: dict[str, Dataset]


def load_text_data(args: DataArguments, splits: Sequence[str], model_labels: Mapping[str, int]) -> TextData:
    """
    Read and check the data.

    Args:
        args (`DataArguments`): The source of the data.
        splits (`Sequence[str]`):
            Those of `train`, `validation` and `test` that the run needs; `shift_files` are read with `test`.
        model_labels (`Mapping[str, int]`): The label ids of the model; used for own files if `train` is not read.

    Raises:
        ValueError: for data that cannot be trained or evaluated on; names the file, the row and the setting.
    """
    tables = _tables(args, splits)
    if "test" in splits:
        tables |= {
            f"shift_{name}": _read_file(args, Path(path).expanduser()) for name, path in args.shift_paths.items()
        }
    task = GLUE_TASKS[args.task_name] if args.task_name else None
    columns = args.text_columns
    label_column = args.label_column or "label"
    labelled = {split for split, (_, table) in tables.items() if _is_labelled(args, split, table)}
    for split, (source, table) in tables.items():
        needed = (*columns, label_column) if split in labelled else columns
        check_columns(source, table, needed, "Rename one" if task else COLUMN_SETTINGS)

    labels: tuple[str, ...] | None = None
    ids: dict[str, int] = {}
    if not args.is_regression:
        if task and task.labels:
            labels = task.labels
        elif "train" in tables:
            source, table = tables["train"]
            labels = _find_labels(source, table[label_column].to_pylist())
        else:
            labels = tuple(sorted(model_labels, key=lambda name: model_labels[name]))
        ids = {name: number for number, name in enumerate(labels)}
        if task or all(name == f"LABEL_{number}" for name, number in ids.items()):
            ids |= {str(number): number for number in range(len(labels))}

    parts: dict[str, dict[str, list]] = {}
    for split, (source, table) in tables.items():
        texts = [read_texts(source, name, table[name], keeps_empty=True) for name in columns]
        parts[split] = dict(zip(("text", "text_pair"), texts, strict=False))
        if split in labelled:
            raw = table[label_column].to_pylist()
            bounds = STSB_RANGE if args.task_name == "stsb" else (-math.inf, math.inf)
            parts[split]["label"] = _numbers(source, raw, bounds) if labels is None else _class_ids(source, raw, ids)
    if "train" in parts:
        train, held_out = split_training_data(parts.pop("train"), args)
        # A single class is refused below.
        if labels is not None and len(labels) > 1 and args.label_noise:
            train["label"] = with_label_noise(train["label"], len(labels), args)
        parts |= {"train": train} if "train" in splits else {}
        parts |= {"validation": held_out} if args.validation_fraction and "validation" in splits else {}
    for split in parts:
        if split.startswith("validation"):
            parts[split] = {name: column[: args.max_eval_samples] for name, column in parts[split].items()}
    if args.calibration_fraction and "validation" in parts:
        parts["validation"], parts["calibration"] = split_validation_data(parts["validation"], args)
    for split in parts:
        needs_two = labels is None or args.task_name == "cola"
        if split == "train" or (needs_two and split.startswith("validation")):
            _check_differ(tables[split if split in tables else "train"][0], split, parts[split]["label"])
    datasets = {split: Dataset.from_dict(columns) for split, columns in parts.items()}
    return TextData(labels, datasets)


def _tables(args: DataArguments, splits: Sequence[str]) -> dict[str, tuple[str, pa.Table]]:
    """The source and the rows of each split. With `validation_fraction`, `train` includes the held-out rows."""
    read = _hub_tables if args.task_name and not args.data_dir else _file_tables
    if not args.validation_fraction:
        return read(args, splits)
    sources = {"train": "train", "validation": "train", "test": "validation" if args.task_name else "test"}
    tables = read(args, list(dict.fromkeys(sources[split] for split in splits)))
    if args.task_name:
        return {split.replace("validation", "test"): table for split, table in tables.items()}
    return tables


def _is_labelled(args: DataArguments, split: str, table: pa.Table) -> bool:
    """Whether a split has labels. The labels of GLUE's test data are hidden; other test data may have the column."""
    if not split.startswith("test"):
        return True
    if args.task_name:
        return args.validation_fraction > 0
    return (args.label_column or "label") in table.column_names


def _hub_tables(args: DataArguments, splits: Sequence[str]) -> dict[str, tuple[str, pa.Table]]:
    hub = load_hub(f"task_name={args.task_name}", HUB_NAME, args.task_name, "data_dir")
    names: dict[str, str] = {}
    for split in splits:
        if args.task_name == "mnli" and split != "train":
            names |= {split: f"{split}_matched", f"{split}_mismatched": f"{split}_mismatched"}
        else:
            names[split] = split
    return {split: (f"{HUB_NAME} {args.task_name} {name}", hub[name].data.table) for split, name in names.items()}


def _file_tables(args: DataArguments, splits: Sequence[str]) -> dict[str, tuple[str, pa.Table]]:
    paths: dict[str, Path] = {}
    for split in splits:
        if args.task_name is None:
            if getattr(args, f"{split}_file") is None:
                raise ValueError(f"No {split} data: set {split}_file, or leave out {NEEDED_BY[split]}.")
            paths[split] = Path(getattr(args, f"{split}_file")).expanduser()
            continue
        stems = ("dev", "validation") if split == "validation" else (split,)
        if args.task_name == "mnli" and split != "train":
            if other := _find_file(args, [f"{stem}_mismatched" for stem in stems]):
                paths[f"{split}_mismatched"] = other
            stems = (*stems, *(f"{stem}_matched" for stem in stems))
        found = _find_file(args, stems)
        if found is None:
            raise ValueError(
                f"No {split} data: data_dir={args.data_dir} has no {args.task_name}/{{{','.join(stems)}}}"
                f".{{{','.join(suffix[1:] for suffix in SUFFIXES)}}}. {_explain_data_dir(args, stems)}"
                f"Add one, or leave out {NEEDED_BY[split]}."
            )
        paths[split] = found
    return {split: _read_file(args, path) for split, path in sorted(paths.items())}


def _read_file(args: DataArguments, path: Path) -> tuple[str, pa.Table]:
    return str(path), read_table(path, (*args.text_columns, args.label_column or "label"))


def _explain_data_dir(args: DataArguments, stems: Sequence[str]) -> str:
    """Explain what is wrong with `data_dir` itself; empty if nothing is."""
    folder = Path(str(args.data_dir)).expanduser()
    if not folder.is_dir():
        return f"There is no such folder: {explain_missing(folder)} "
    if _files(folder, stems):
        named = folder.resolve().name == args.task_name
        inner = folder / str(args.task_name)
        way_out = f"set data_dir to {folder.resolve().parent}" if named else f"move them to {inner}"
        return (
            f"It contains the files of the task itself, which belong in a folder {args.task_name} in it: {way_out}. "
        )
    return ""


def _files(folder: Path, stems: Sequence[str]) -> list[Path]:
    return [path for stem in stems for suffix in SUFFIXES if (path := folder / (stem + suffix)).is_file()]


def _find_file(args: DataArguments, stems: Sequence[str]) -> Path | None:
    found = _files(Path(str(args.data_dir)).expanduser() / str(args.task_name), stems)
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are both there: keep one of them.")
    return found[0] if found else None


def _find_labels(source: str, values: list) -> tuple[str, ...]:
    names = sorted({str(value) for value in values if value is not None and str(value).strip()})
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return tuple(names)
    if not all(number.is_integer() for number in numbers):
        raise ValueError(
            f"{source}: the labels are fractions, not classes. Set regression to predict numbers, or name the classes."
        )
    return tuple(sorted(names, key=float))


def _class_ids(source: str, values: list, ids: Mapping[str, int]) -> list[int]:
    for row, value in enumerate(values, start=1):
        if value is None or str(value) not in ids:
            raise ValueError(f"{source}, row {row}: label {value!r} is not one of {', '.join(ids)}.")
    return [ids[str(value)] for value in values]


def _numbers(source: str, values: list, bounds: tuple[float, float]) -> list[float]:
    numbers = []
    for row, value in enumerate(values, start=1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and bounds[0] <= number <= bounds[1]):
            raise ValueError(
                f"{source}, row {row}: label {value!r} is not a number from {bounds[0]} to {bounds[1]}, which a "
                "regression needs."
            )
        numbers.append(number)
    return numbers


def _check_differ(source: str, split: str, values: list):
    if len(set(values)) < 2:
        limit = "max_train_samples" if split == "train" else "max_eval_samples"
        raise ValueError(
            f"{source}: all labels are the same ({values[0]}), which leaves nothing to learn or to correlate with. "
            f"Check the label column; or, if {limit} is set, raise it or shuffle the rows."
        )
