"""
Measure how much the gradient of the previous step, which one pass uses for the ascent, still raises the loss.

    python recipes/studies/staleness.py recipes/glue/sst2.yaml --max_steps 75 --output_file staleness.json

Trains without perturbation, with the settings of `run_glue.py`. At every step, the loss of the current batch (without
dropout) is measured at weights moved by `rho` along three directions: the gradient of the same batch, as with two
passes; the gradient of the previous batch at the current weights; and the gradient of the previous step, as with one
pass. The first and the second differ only in the batch, the second and the third only in the age of the gradient.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import logging

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.ascent import Ascent, find_ascent
from hf_lsam.perturbation import move_cosine
from hf_lsam.step import LSAMStep
from hf_lsam_recipes import run_glue
from hf_lsam_recipes.studies.rounding import SELECTIONS
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.markdown import markdown_table
from hf_lsam_recipes.support.stamp import stamp

RHOS = (0.05, 0.2, 0.5)
DIRECTIONS = ("own", "other batch", "step before")


class Probe:
    """Replaces the `training_step` of a Trainer by one that also measures after each step."""

    def __init__(self, trainer: LSAMTrainer):
        self.trainer = trainer
        self.plain_step = trainer.training_step
        self.steps = {name: LSAMStep(trainer.model, LSAMConfig(**own), 1) for name, own in SELECTIONS.items()}
        self.inputs: dict[str, Any] | None = None
        self.ascents: dict[str, Ascent] = {}
        self.rows: list[dict[str, Any]] = []

    def __call__(self, model, inputs, *args) -> Tensor:
        before, ascents = self.inputs, self.ascents
        inputs = send_to_device(inputs, self.trainer.args.device)
        if before is not None:
            again = self._ascents_of(model, before)
        loss = self.plain_step(model, inputs, *args)
        self.inputs, self.ascents = inputs, self._ascents()
        if before is not None and self.ascents.keys() == ascents.keys() == again.keys() == SELECTIONS.keys():
            model.eval()
            start = self._loss(model, inputs)
            for name in SELECTIONS:
                directions = dict(zip(DIRECTIONS, (self.ascents[name], again[name], ascents[name]), strict=True))
                self.rows += self._measure(model, inputs, start, name, directions)
            model.train()
        return loss

    def _measure(self, model, inputs, start: float, name: str, directions: dict[str, Ascent]) -> list[dict[str, Any]]:
        own = {id(weight): part for weight, part in zip(*_parts(directions["own"]), strict=True)}
        rows = []
        for direction, ascent in directions.items():
            shared = [(d, own[id(w)]) for w, d in zip(*_parts(ascent), strict=True) if id(w) in own]
            row: dict[str, Any] = {"step": self.trainer.state.global_step, "selection": name, "direction": direction}
            if shared:
                moved, slope = map(list, zip(*shared, strict=True))
                row["cosine"] = move_cosine(moved, [torch.zeros_like(part) for part in moved], slope)
            for rho in RHOS:
                scale = rho / ascent.norm
                with self.steps[name].perturbation.moved(ascent.weights, ascent.direction, scale):
                    row[f"rise at {rho}"] = self._loss(model, inputs) - start
            rows.append(row)
        return rows

    def _ascents_of(self, model, inputs) -> dict[str, Ascent]:
        """The ascents of a batch at the current weights, in training mode. Gradients are cleared afterwards."""
        with torch.random.fork_rng():
            self.trainer.compute_loss(model, dict(inputs)).backward()
        ascents = self._ascents()
        model.zero_grad()
        return ascents

    def _ascents(self) -> dict[str, Ascent]:
        """One ascent per selection, along a copy of the gradients in `.grad`."""
        found = {name: find_ascent(step.candidates, step.costs, step.config) for name, step in self.steps.items()}
        ascents = {name: ascent for name, ascent in found.items() if isinstance(ascent, Ascent)}
        for ascent in ascents.values():
            ascent.direction = [part.clone() for part in ascent.direction]
        return ascents

    @torch.no_grad()
    def _loss(self, model, inputs) -> float:
        return float(self.trainer.compute_loss(model, dict(inputs)))


def _parts(ascent: Ascent) -> tuple[list[Tensor], list[Tensor]]:
    return ascent.weights, ascent.direction


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each selection and direction: median cosine with the batch's own gradient, and mean rise relative to it."""
    lines = []
    for name in SELECTIONS:
        own = [row for row in rows if row["selection"] == name and row["direction"] == "own"]
        for direction in DIRECTIONS:
            of = [row for row in rows if row["selection"] == name and row["direction"] == direction]
            line: dict[str, Any] = {"selection": name, "direction": direction, "steps": len(of)}
            line["cosine"] = statistics.median(row["cosine"] for row in of if "cosine" in row)
            for rho in RHOS:
                rise = f"rise at {rho}"
                line[rise] = statistics.fmean(row[rise] for row in of) / statistics.fmean(row[rise] for row in own)
            lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and measure, print a table, and write the output file if one is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_file", type=Path)
    own, rest = parser.parse_known_args(argv)
    run = run_glue.prepare([*rest, "--block_selection", "none", "--save_strategy", "no"])
    if not run.args.do_train or run.args.gradient_accumulation_steps > 1:
        raise ValueError("Every training step is measured: set do_train, and gradient_accumulation_steps to 1.")
    check_output_file("output_file", own.output_file)
    logging.set_verbosity_error()
    probe = Probe(run.trainer)
    run.trainer.training_step = probe  # type: ignore[assignment]
    run.trainer.train()
    if not probe.rows:
        raise ValueError(
            "Nothing was measured, since each step is compared with the previous one: train for 2 steps or more."
        )
    lines = summary(probe.rows)
    rounded = (
        {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in line.items()} for line in lines
    )
    print(markdown_table(list(rounded)))
    if own.output_file is not None:
        results = {"stamp": stamp([run.args.seed]), "summary": lines, "rows": probe.rows}
        write_json(own.output_file, results)
    return lines


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
