"""
Measure how much of a perturbation remains in 16-bit weights, with rounding to nearest or stochastic rounding.

    python recipes/studies/rounding.py --models path/to/MiniLM-L6,path/to/SmolLM2-135M --text_file path/to/sst2/dev.tsv

The initial weights are representable in the dtype. Gradients and losses are computed in float32, so only the rounding
of the perturbed weights differs from a perturbation in float32.
"""

import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    logging,
    set_seed,
)

from hf_lsam import LSAMConfig
from hf_lsam.ascent import Ascent, find_ascent
from hf_lsam.perturbation import move_cosine, norms
from hf_lsam.rounding import round_stochastically
from hf_lsam.step import LSAMStep
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.stamp import stamp

DTYPES = (torch.bfloat16, torch.float16)
SELECTIONS: dict[str, dict[str, Any]] = {
    "last 2": dict(block_selection="last"),
    "top 2": dict(),
    "all": dict(block_selection="all"),
}
RHOS = (0.05, 0.1, 0.5, 1.0)


@dataclass
class RoundingArguments:
    """Models, data and output of the measurement."""

    models: str = field(metadata={"help": "Comma-separated folders of models, named by their last part in the table."})
    text_file: str = field(metadata={"help": "A TSV with the columns sentence and label."})
    rows: int = field(default=8, metadata={"help": "Number of rows, from the first on, that are the batch."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, but is {self.rows}.")
        check_output_file("output_file", self.output_file)


def exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Leave `values` as they are."""
    return values


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of `dtype`."""
    return values.to(dtype).float()


def stochastic(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to either neighbour in `dtype`, as pass 2 does, from the generator of the run."""
    return round_stochastically(values, dtype, torch.default_generator).float()


def read_rows(args: RoundingArguments) -> list[dict[str, str]]:
    """The first rows of the text file; raises `ValueError` unless each has a sentence and a label."""
    try:
        with open(args.text_file, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[: args.rows]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_file={args.text_file} cannot be read: {error}.") from error
    if not rows or not all(row.get("sentence") and str(row.get("label")).isdigit() for row in rows):
        raise ValueError(
            f"text_file={args.text_file} must be a TSV with the columns sentence and label, a number of a class in "
            "each row."
        )
    return rows


def find_config(folder: str) -> PreTrainedConfig:
    """The configuration of a model; raises `ValueError` if there is no such model."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"models: {folder} cannot be loaded ({' '.join(str(error).split())}).") from error


def load(
    folder: str, config: PreTrainedConfig, rows: list[dict[str, str]]
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model in float32 without dropout, and a batch: a language model's own text, or sentences with labels."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    if (config.architectures or [""])[0].endswith("ForCausalLM"):
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        batch["labels"] = torch.tensor([int(row["label"]) for row in rows])
    return model.eval(), dict(batch)


def measure(model: torch.nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """
    Measure each selection, rho and rounding, for a model whose weights are representable in `dtype`.

    Yields:
        For each selection and rho, by rounding: the `cosine` of the perturbation with the gradient, and its `length`
        over rho; compared with an exact perturbation, the ratio of the `rise` of the loss, and the
        `correction_cosine` between the changes of the gradient.
    """
    for selection, settings in SELECTIONS.items():
        config = LSAMConfig(**settings)
        step = LSAMStep(model, config, max_steps=1)
        loss = backward(model, batch)
        ascent = find_ascent(step.candidates, step.costs, config)
        assert isinstance(ascent, Ascent)
        before = [weight.detach().clone() for weight in ascent.weights]
        for rho in RHOS:
            row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "selection": selection, "rho": rho}
            for rounding in (exact, nearest, stochastic):
                with torch.no_grad():
                    for weight, old, slope in zip(ascent.weights, before, ascent.direction, strict=True):
                        weight.copy_(rounding(old + rho / ascent.norm * slope, dtype))
                cosine = move_cosine(ascent.weights, before, ascent.direction)
                moves = [weight.detach() - old for weight, old in zip(ascent.weights, before, strict=True)]
                rise = backward(model, batch) - loss
                perturbed = [weight.grad for weight in ascent.weights if weight.grad is not None]
                added = [one - plain for one, plain in zip(perturbed, ascent.gradients, strict=True)]
                if rounding is exact:
                    exact_rise, exact_added = rise, added
                    continue
                correction = move_cosine(added, [torch.zeros_like(part) for part in added], exact_added)
                length = float(norms(moves).square().sum().sqrt()) / rho
                row[rounding.__name__] = dict(
                    cosine=cosine, length=length, rise=rise / exact_rise, correction_cosine=correction
                )
            yield row
            with torch.no_grad():
                torch._foreach_copy_(ascent.weights, before)


def backward(model: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """The loss, with new gradients in `.grad`."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`: measure, print the table row by row, and update `output_file` after each row."""
    (args,) = parse_arguments((RoundingArguments,), sys.argv[1:] if argv is None else argv, __doc__ or "")
    logging.set_verbosity_error()
    texts, folders = read_rows(args), args.models.split(",")
    configs = {folder: find_config(folder) for folder in folders}
    rows = []
    print("| model | dtype | selection | rho | rounded | cosine | length / rho | rise | correction |")
    print("|---" * 9 + "|")
    for folder, dtype in itertools.product(folders, DTYPES):
        model, batch = load(folder, configs[folder], texts)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(nearest(weight, dtype))
        for row in measure(model, batch, dtype):
            rows.append({"model": Path(folder).name} | row)
            for name in ("nearest", "stochastic"):
                head = " | ".join(str(rows[-1][key]) for key in ("model", "dtype", "selection", "rho"))
                figures = " | ".join(f"{figure:.2f}" for figure in row[name].values())
                print(f"| {head} | {name} | {figures} |", flush=True)
            if args.output_file:
                results = {"stamp": stamp([0]), "rows_of_text": args.rows, "figures": rows}
                write_json(Path(args.output_file), results)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"rounding.py: error: {error}")
