"""Every Python example of README.md and the pages runs, on tiny models and data of the names that it has."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from packaging import version
from pages import ROOT, blocks, pages_with
from tiny import arguments, training_lines
from transformers import AutoModelForSequenceClassification

from hf_lsam import LSAMTrainer

if version.parse(transformers.__version__) < version.parse("5.19"):
    pytest.skip("the recipes need transformers 5.19", allow_module_level=True)

from tiny_hub import ENCODERS, rows, write_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture
def in_hub(hub, monkeypatch):
    """Names of the Hub are folders here, and everything is written here, caches included."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub / "cache")
    return hub


def given() -> dict:
    """What a page takes as given: what its reader has, a Trainer's parts or those of a loop."""

    def model_init():
        return AutoModelForSequenceClassification.from_pretrained(ENCODERS[0])

    model, data = model_init(), rows(16)
    args = arguments("outputs/given", max_steps=4, logging_steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    return dict(
        model=model,
        model_init=model_init,
        args=args,
        train_dataset=data,
        eval_dataset=rows(4),
        trainer=LSAMTrainer(model, args, train_dataset=data),
        optimizer=optimizer,
        loader=loader,
        batches=[*loader],
        epochs=1,
        max_steps=8,
        accelerator=Accelerator(cpu=True),
    )


def run_examples(page: str) -> dict:
    """Run the examples of a page, section by section; returns what the last example of each section has left.

    A section begins with what is given, and with what the sections before it have imported.
    """
    imported, left = {}, {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE):
        names = given() | imported
        for number, example in enumerate(blocks(section, "python"), start=1):
            exec(compile(example, f"{section.splitlines()[0]}, example {number}", "exec"), names)
            imports = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Import | ast.ImportFrom)]
            bound = {(a.asname or a.name).partition(".")[0] for node in imports for a in node.names}
            imported |= {name: names[name] for name in bound}
            left |= names
    return left


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_examples_run(page, in_hub):
    run_examples(page.read_text())


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("perturb_interval=4", "interval=4", TypeError),
        ('block_selection="all"', 'block_selection="every"', ValueError),
        ('"nyu-mll/glue", "sst2"', '"nyu-mll/glue", "sst"', ValueError),
        ('rows["sentence"]', 'rows["text"]', KeyError),
        ("all-MiniLM-L6-v2", "all-MiniLM-L6", OSError),
        ("trainer.train()", "trainer.fit()", AttributeError),
    ],
)
def test_an_example_that_is_wrong_fails(right, wrong, error, in_hub):
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert right in page
    with pytest.raises(error):
        run_examples(page.replace(right, wrong))


def shown_lines(text: str) -> list[dict]:
    """The lines of a log that a page shows."""
    return [ast.literal_eval(block.strip()) for block in blocks(text, "text") if "lsam/" in block]


def test_the_quickstart_shows_the_log_line_that_one_sees(in_hub):
    page = (ROOT / "docs" / "quickstart.md").read_text()
    [shown] = shown_lines(page)
    lines = training_lines(run_examples(page.split("## Read the log")[0])["trainer"])
    assert lines and lines[-1].keys() - {"step"} == shown.keys()
    assert lines[-1]["lsam/active"] == 0.25 == float(shown["lsam/active"])
    described = set(re.findall(r"^\| `(lsam/\w+)` \|", page, re.MULTILINE))
    assert described == {name for name in shown if name.startswith("lsam/")}
