"""The tasks of GLUE, and the settings that say which data `run_glue.py` works on."""

import re
from dataclasses import dataclass, field

from hf_lsam_recipes.support.shipped import did_you_mean

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """
    One task of GLUE, with names and label ids as in `nyu-mll/glue`.

    Args:
        columns (`tuple[str, ...]`): The columns that hold the text: one, or two for a pair.
        labels (`tuple[str, ...]` or `None`): The labels in the order of their ids; `None` for a regression.
        submissions (`tuple[str, ...]`): Names of the prediction files, the mismatched one second.
        submits_names (`bool`): Whether a submission holds labels by name, not by id.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    submissions: tuple[str, ...]
    submits_names: bool = False


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("CoLA.tsv",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("SST-2.tsv",)),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), ("MRPC.tsv",)),
    "stsb": GlueTask(PAIR, None, ("STS-B.tsv",)),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("QQP.tsv",)),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("MNLI-m.tsv", "MNLI-mm.tsv"),
        submits_names=True,
    ),
    "qnli": GlueTask(("question", "sentence"), ENTAILMENT, ("QNLI.tsv",), submits_names=True),
    "rte": GlueTask(PAIR, ENTAILMENT, ("RTE.tsv",), submits_names=True),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment"), ("WNLI.tsv",)),
}
STSB_RANGE = (0.0, 5.0)
# Settings of `DataArguments` that draw from the training data.
DRAWN = ("validation_fraction", "train_fraction", "label_noise", "split_seed")
# Files of predictions that are not to be submitted.
PREDICTIONS = ("predictions.tsv", "predictions_mismatched.tsv")


@dataclass
class DataArguments:
    """
    Which data to train, evaluate and predict on: a GLUE task by name, or files of one's own.

    > Parameters for GLUE

    Args:
        task_name (`str`, *optional*):
            A task of GLUE.
        data_dir (`str`, *optional*):
            Folder with `<task_name>/{train,dev|validation,test}.{tsv,csv,jsonl,parquet}`, for MNLI also
            `{dev|validation,test}_{matched,mismatched}`. Without it, the task comes from `nyu-mll/glue` on the Hub.

    > Parameters for data of one's own

    Args:
        train_file, validation_file, test_file (`str`, *optional*):
            Files with a header row: `.tsv` (tab-separated, no quoting), `.csv`, `.jsonl` or `.parquet`.
        text_column (`str`, *optional*, defaults to `"text"`):
            The column that holds the text.
        text_pair_column (`str`, *optional*):
            The column that holds the second text, if there are two.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column that holds the label.
        regression (`bool`, *optional*, defaults to `False`):
            Whether labels are numbers to predict, not classes.

    > Parameters for both

    Args:
        max_seq_length (`int`, *optional*, defaults to `128`):
            Longer inputs are truncated to this many tokens. Default: GLUE's usual one.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Use the first so many examples only.
        validation_fraction (`float`, *optional*, defaults to `0.0`):
            Hold out this share of the training data, drawn at random, as the validation data. A GLUE task's own
            validation data then takes the place of its test data, whose labels are hidden: settings can be chosen
            on the one part and compared on the other.
        train_fraction (`float`, *optional*, defaults to `1.0`):
            Train on this share, drawn at random, of the training data that is not held out.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the training labels to replace by another class at random; those of all other data stay.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of these three, and of what follows. It does not depend on `seed`, so that runs that differ in it have
            the same data.

    > Parameters for the probabilities of a classifier

    Args:
        calibration_fraction (`float`, *optional*, defaults to `0.0`):
            Set this share of the validation data aside, drawn at random, and fit a temperature on it after training
            (nothing else uses these rows). Metrics then include the loss and the Brier score of scaled logits.
        shift_files (`list[str]`, *optional*):
            Labelled files from elsewhere, as `NAME=PATH`, to predict on, too: their metrics are `shift_NAME_...`, and
            `shift_...` the means over all of them. The columns are those of the task.
    """

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with <task_name>/{train,dev,test}.{tsv,csv,jsonl,parquet}."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training data: tsv, csv, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same columns."})
    test_file: str | None = field(default=None, metadata={"help": "Data to predict; has metrics if it has labels."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; 'text' unless set."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text, if any."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label; 'label' unless set."})
    regression: bool = field(default=False, metadata={"help": "Labels of the files are numbers, not classes."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens after which an input is truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many examples."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training data to validate with; GLUE's own is then for the test."}
    )
    train_fraction: float = field(default=1.0, metadata={"help": "Share of the rest to train on."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of the training labels to make wrong."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the three above, and of calibration_fraction."})
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Share of the validation data to fit a temperature on, and for nothing else."}
    )
    shift_files: list[str] | None = field(
        default=None, metadata={"help": "Labelled files to predict on, too: NAME=PATH ..."}
    )

    def __post_init__(self):
        own = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if self.task_name is None:
            if not own:
                raise ValueError(
                    "No data: set task_name to a GLUE task, or train_file, validation_file or test_file to files."
                )
            if self.data_dir is not None:
                raise ValueError(f"data_dir holds GLUE tasks, and {own[0]} is no part of one: leave one of them out.")
        else:
            if self.task_name not in GLUE_TASKS:
                near = did_you_mean(self.task_name, list(GLUE_TASKS))
                raise ValueError(f"task_name must be one of {', '.join(GLUE_TASKS)}, but is {self.task_name!r}.{near}")
            own += [name for name in ("text_column", "text_pair_column", "label_column") if getattr(self, name)]
            own += ["regression"] if self.regression else []
            if own:
                raise ValueError(
                    f"{own[0]} is for files of one's own, and task_name={self.task_name} is a GLUE task: leave one of "
                    "them out. Local files of a GLUE task are read by data_dir."
                )
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}.")
        for name in ("validation_fraction", "label_noise", "calibration_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, but is {getattr(self, name)}.")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be more than 0 and at most 1, but is {self.train_fraction}.")
        if self.split_seed < 0:
            raise ValueError(f"split_seed cannot be negative, but is {self.split_seed}.")
        if self.validation_fraction and self.validation_file:
            raise ValueError("validation_file and validation_fraction both say what to validate with: leave one out.")
        if self.label_noise and self.is_regression:
            raise ValueError("label_noise replaces classes, and this is a regression: set it to 0.")
        if self.calibration_fraction and self.is_regression:
            raise ValueError("calibration_fraction is for probabilities, and this is a regression: set it to 0.")
        for item in self.shift_files or ():
            if not re.fullmatch(r"\w+=.+", item):
                raise ValueError(
                    f"shift_files must be NAME=PATH ..., with names of letters, digits and underscores, but one is "
                    f"{item!r}."
                )
        if len(self.shift_paths) < len(self.shift_files or ()):
            raise ValueError("shift_files names one name twice: give each file a name of its own.")

    @property
    def shift_paths(self) -> dict[str, str]:
        """The path of each of `shift_files` by its name."""
        return dict(item.split("=", 1) for item in self.shift_files or ())

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold the text: one, or two for a pair."""
        if self.task_name is not None:
            return GLUE_TASKS[self.task_name].columns
        first = self.text_column or "text"
        return (first, self.text_pair_column) if self.text_pair_column else (first,)

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return self.regression if self.task_name is None else GLUE_TASKS[self.task_name].labels is None
