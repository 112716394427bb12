"""The tasks of GLUE, and the settings of the data of `run_glue.py`."""

import re
from dataclasses import dataclass, field

from hf_lsam_recipes.support.shipped import did_you_mean

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """
    One task of GLUE, with names and label ids as in `nyu-mll/glue`.

    Args:
        columns (`tuple[str, ...]`): The columns of the text: one, or two for a pair.
        labels (`tuple[str, ...]` or `None`): The labels in the order of their ids; `None` for a regression.
        submissions (`tuple[str, ...]`): Names of the prediction files; for MNLI, the mismatched one is second.
        submits_names (`bool`): Whether a submission contains the names of labels instead of their ids.
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
# Settings of `DataArguments` for the sampling of the training data.
DRAWN = ("validation_fraction", "train_fraction", "label_noise", "split_seed")
# Names of prediction files that are not GLUE submissions.
PREDICTIONS = ("predictions.tsv", "predictions_mismatched.tsv")


@dataclass
class DataArguments:
    """
    Which data to train, evaluate and predict on: a GLUE task, or your own files.

    > Parameters for GLUE

    Args:
        task_name (`str`, *optional*):
            Name of a GLUE task.
        data_dir (`str`, *optional*):
            Folder with `<task_name>/{train,dev|validation,test}.{tsv,csv,jsonl,parquet}`, for MNLI also
            `{dev|validation,test}_{matched,mismatched}`. Without it, the task comes from `nyu-mll/glue` on the Hub.

    > Parameters for your own files

    Args:
        train_file, validation_file, test_file (`str`, *optional*):
            Files with a header row: `.tsv` (tab-separated, no quoting), `.csv`, `.jsonl` or `.parquet`.
        text_column (`str`, *optional*, defaults to `"text"`):
            The column of the text.
        text_pair_column (`str`, *optional*):
            The column of the second text of a pair.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column of the label.
        regression (`bool`, *optional*, defaults to `False`):
            Whether labels are numbers to predict instead of classes.

    > Parameters for both

    Args:
        max_seq_length (`int`, *optional*, defaults to `128`):
            Maximum number of tokens; longer inputs are truncated. The default is common for GLUE.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Maximum number of examples, from the first on.
        validation_fraction (`float`, *optional*, defaults to `0.0`):
            Fraction of the training data that is held out at random as validation data. The validation data of a GLUE
            task then replaces its test data, whose labels are hidden. So settings can be chosen on the held-out part
            and compared on GLUE's validation data.
        train_fraction (`float`, *optional*, defaults to `1.0`):
            Fraction of the remaining training data that is used, drawn at random.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Fraction of the training labels that are replaced by another class at random. Other data has no noise.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of these three and of `calibration_fraction`. It is independent of `seed`, so runs with different
            seeds have the same data.

    > Parameters for the probabilities of a classifier

    Args:
        calibration_fraction (`float`, *optional*, defaults to `0.0`):
            Fraction of the validation data, drawn at random, that is only used to fit a temperature after training.
            Metrics then also include the negative log-likelihood and the Brier score of the scaled logits.
        shift_files (`list[str]`, *optional*):
            Labelled files of another distribution, as `NAME=PATH`, that are also predicted on with `do_predict`. Their
            metrics are `shift_NAME_...`, and `shift_...` are means over all files. The columns are those of the task.

    Raises:
        ValueError: if a setting is out of range, or two settings contradict each other.
    """

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with <task_name>/{train,dev,test}.{tsv,csv,jsonl,parquet}."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training data: tsv, csv, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same columns."})
    test_file: str | None = field(default=None, metadata={"help": "Data to predict; metrics if it has labels."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; 'text' unless set."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text, if any."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label; 'label' unless set."})
    regression: bool = field(default=False, metadata={"help": "Labels of the files are numbers, not classes."})
    max_seq_length: int = field(default=128, metadata={"help": "Maximum number of tokens of an input."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of validation examples."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Fraction of the training data to validate on; GLUE's own becomes the test data."},
    )
    train_fraction: float = field(default=1.0, metadata={"help": "Fraction of the rest to train on."})
    label_noise: float = field(default=0.0, metadata={"help": "Fraction of the training labels to replace."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the three above, and of calibration_fraction."})
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of the validation data that is only used to fit a temperature."}
    )
    shift_files: list[str] | None = field(
        default=None, metadata={"help": "Further labelled files to predict on: NAME=PATH ..."}
    )

    def __post_init__(self):
        own = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if self.task_name is None:
            if not own:
                raise ValueError(
                    "No data: set task_name to a GLUE task, or train_file, validation_file or test_file to files."
                )
            if self.data_dir is not None:
                raise ValueError(
                    f"data_dir is for GLUE tasks, and {own[0]} for your own files: leave one of them out."
                )
        else:
            if self.task_name not in GLUE_TASKS:
                near = did_you_mean(self.task_name, list(GLUE_TASKS))
                raise ValueError(f"task_name must be one of {', '.join(GLUE_TASKS)}, but is {self.task_name!r}.{near}")
            own += [name for name in ("text_column", "text_pair_column", "label_column") if getattr(self, name)]
            own += ["regression"] if self.regression else []
            if own:
                raise ValueError(
                    f"{own[0]} is for your own files, and task_name={self.task_name} is a GLUE task: leave one of "
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
            raise ValueError("validation_file and validation_fraction both say what to validate on: leave one out.")
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
            raise ValueError("shift_files uses a name twice: give each file a different name.")

    @property
    def shift_paths(self) -> dict[str, str]:
        """The path of each of `shift_files` by its name."""
        return dict(item.split("=", 1) for item in self.shift_files or ())

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the text: one, or two for a pair."""
        if self.task_name is not None:
            return GLUE_TASKS[self.task_name].columns
        first = self.text_column or "text"
        return (first, self.text_pair_column) if self.text_pair_column else (first,)

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted instead of a class."""
        return self.regression if self.task_name is None else GLUE_TASKS[self.task_name].labels is None
