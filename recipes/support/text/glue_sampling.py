"""Sampling of the training data: held-out rows, a fraction to train on, calibration rows, and label noise."""

from collections.abc import Mapping

import numpy as np

from hf_lsam_recipes.support.text.glue_tasks import DataArguments

Columns = dict[str, list]


def split_training_data(columns: Columns, args: DataArguments) -> tuple[Columns, Columns]:
    """
    Split the training data into training rows and rows held out for validation.

    The split depends on `split_seed` only, so it is the same for each `seed` and each method. A smaller
    `train_fraction` selects a subset of the rows of a larger one, with the same held-out rows.

    Args:
        columns (`dict[str, list]`): The whole training data by column.
        args (`DataArguments`): Its `validation_fraction`, `train_fraction`, `max_train_samples` and `split_seed`.

    Returns:
        The training rows in the order of the file, and the held-out rows in random order.

    Raises:
        ValueError: if there are no training rows, or no held-out rows although some are requested.
    """
    count = len(columns["label"])
    order = np.random.default_rng(args.split_seed).permutation(count)
    held_out = round(args.validation_fraction * count)
    rest = order[held_out:]
    kept = np.sort(rest[: round(args.train_fraction * len(rest))])[: args.max_train_samples]
    if len(kept) == 0 or (args.validation_fraction and held_out == 0):
        part = "train on" if len(kept) == 0 else "validate with"
        raise ValueError(
            f"validation_fraction={args.validation_fraction} and train_fraction={args.train_fraction} of {count} rows "
            f"leave none to {part}. Change one of them."
        )
    return _rows(columns, kept), _rows(columns, order[:held_out])


def split_validation_data(columns: Columns, args: DataArguments) -> tuple[Columns, Columns]:
    """
    Split the validation data into rows for metrics and rows for calibration, drawn with `split_seed`.

    Args:
        columns (`dict[str, list]`): The whole validation data by column.
        args (`DataArguments`): Its `calibration_fraction` and `split_seed`.

    Returns:
        The rows for metrics and the rows that a temperature is fitted on, both in the order of the data.

    Raises:
        ValueError: if either has no row.
    """
    count = len(columns["label"])
    order = np.random.default_rng([args.split_seed, 2]).permutation(count)
    aside = round(args.calibration_fraction * count)
    if aside in (0, count):
        part = "fit a temperature on" if aside == 0 else "compute metrics from"
        raise ValueError(
            f"calibration_fraction={args.calibration_fraction} of {count} validation rows leaves none to {part}. "
            "Change it, or set it to 0."
        )
    return _rows(columns, np.sort(order[aside:])), _rows(columns, np.sort(order[:aside]))


def with_label_noise(labels: list[int], classes: int, args: DataArguments) -> list[int]:
    """
    Add label noise: replace a fraction `label_noise` of the labels, rounded to whole rows, by another random class.

    It depends on `split_seed`. More noise adds wrong labels, and keeps those of less noise.

    Args:
        labels (`list[int]`): Class ids.
        classes (`int`): Number of classes, at least 2.
        args (`DataArguments`): Its `label_noise` and `split_seed`.
    """
    draw = np.random.default_rng([args.split_seed, 1])
    order, shift = draw.permutation(len(labels)), draw.integers(1, classes, size=len(labels))
    noisy = np.array(labels)
    chosen = order[: round(args.label_noise * len(labels))]
    noisy[chosen] = (noisy[chosen] + shift[chosen]) % classes
    return noisy.tolist()


def _rows(columns: Mapping[str, list], chosen: np.ndarray) -> Columns:
    return {name: [values[row] for row in chosen] for name, values in columns.items()}
