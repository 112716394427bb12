"""Which training rows are trained on, which are held out for validation, and which labels are made wrong."""

from collections.abc import Mapping

import numpy as np

from hf_lsam_recipes.support.text.glue_tasks import DataArguments

Columns = dict[str, list]


def split_training_data(columns: Columns, args: DataArguments) -> tuple[Columns, Columns]:
    """
    Split the training data into what is trained on and what is held out for validation.

    Everything is drawn with `split_seed`, so it is the same for each `seed` and each method. A smaller
    `train_fraction` trains on a part of the rows of a larger one, and holds out the same rows.

    Args:
        columns (`dict[str, list]`): All of it, column by column.
        args (`DataArguments`): Its `validation_fraction`, `train_fraction`, `max_train_samples` and `split_seed`.

    Returns:
        The training rows in the order of the file, and those for validation in random order.

    Raises:
        ValueError: if either is left without a row.
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
    The validation data that metrics are computed on, in its order, and the share of `calibration_fraction` that a
    temperature is fitted on, drawn with `split_seed`. Raises `ValueError` if either is left without a row.
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
    `labels` with a share of `label_noise` of them, rounded to whole rows, replaced by another class at random.

    Drawn with `split_seed`: more noise makes the same labels wrong in the same way, and others besides.
    """
    draw = np.random.default_rng([args.split_seed, 1])
    order, shift = draw.permutation(len(labels)), draw.integers(1, classes, size=len(labels))
    noisy = np.array(labels)
    chosen = order[: round(args.label_noise * len(labels))]
    noisy[chosen] = (noisy[chosen] + shift[chosen]) % classes
    return noisy.tolist()


def _rows(columns: Mapping[str, list], chosen: np.ndarray) -> Columns:
    return {name: [values[row] for row in chosen] for name, values in columns.items()}
