"""`LSAM`: what is refused, the page that shows it, and its types."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny import Examples, bert, largest_difference, weights
from torch import nn

import hf_lsam
from hf_lsam import LSAM, LSAMConfig


def hooked():
    model = bert()
    model.classifier.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


FullyShardedDataParallel = type("FullyShardedDataParallel", (nn.Sequential,), {})


@pytest.mark.parametrize(
    "make, config, options, error, message",
    [
        (lambda: nn.Linear(2, 2), {}, {}, ValueError, "None of the 0 blocks of Linear can be trained"),
        (bert, dict(block_pattern="nothing"), {}, ValueError, "block_pattern 'nothing' matches no module"),
        (lambda: nn.DataParallel(bert()), {}, {}, NotImplementedError, "DataParallel is not supported by LSAM"),
        (lambda: FullyShardedDataParallel(bert()), {}, {}, NotImplementedError, "FullyShardedDataParallel is not"),
        (hooked, {}, {}, NotImplementedError, "classifier.weight has hooks"),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, scaler=None)),
            NotImplementedError,
            "DEEPSPEED is not supported by LSAM, .* LSAMTrainer runs under .* DeepSpeed ZeRO 1 and 2",
        ),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, scaler=None)),
            NotImplementedError,
            "FSDP is not supported by LSAM, .* LSAMTrainer runs under FSDP2",
        ),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(scaler=None), scaler=torch.amp.GradScaler("cpu")),
            ValueError,
            "An accelerator has its own gradient scaler",
        ),
    ],
)
def test_is_refused_when_it_is_made(make, config, options, error, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(error, match=message):
        LSAM(model, optimizer, LSAMConfig(**config), 1, **options)


# The page

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()


def test_the_loops_of_the_page_run():
    """Each on what the one before has left."""
    model = bert().train()
    names = dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), epochs=1, max_steps=8)
    names |= dict(loader=[Examples(32).batch(4 * number, 4) for number in range(8)], torch=torch)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.split("## A loop without a Trainer")[1], re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets[:3]:
        before = weights(model)
        if "lsam" in names:
            names["lsam"].step = 0
        snippet = snippet.replace("perturb_interval=4", "perturb_interval=1").replace(
            "perturb_start=0.1", "perturb_start=0"
        )
        exec(snippet.replace("GradScaler()", 'GradScaler("cpu")').replace('"cuda", torch.float16', '"cpu"'), names)
        assert largest_difference(weights(model), before) > 1e-5
        assert names["lsam"].log()["lsam/active"] == 1 and names["lsam"].step in (8, 2, 1)
    names["accelerator"] = Accelerator(cpu=True)
    before = weights(model)
    exec(snippets[3], names)
    assert largest_difference(weights(model), before) > 1e-5 and names["lsam"].step == 8


# Types

USER = """
import torch
from hf_lsam import LSAM, LSAMConfig

def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> dict[str, float]:
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=len(batches))
    for batch in batches:
        loss = lsam.backward(lambda: model(batch).mean(), is_last=True)
        print(float(loss), lsam.step, lsam.in_second_pass)
    lsam.save("out")
    wrong: int = lsam.log()
    lsam.backward(batches[0], last=True)
    LSAM(model, optimizer)
    return lsam.log()
"""


def test_mypy_is_strict_on_the_file_of_a_user(tmp_path):
    others = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
        for name in ("torch", "transformers", "accelerate", "numpy", "safetensors")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{others}[mypy-hf_lsam.*]\nfollow_imports = silent\n")
    (tmp_path / "user.py").write_text(USER)
    root = str(Path(hf_lsam.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "user.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": root, "PATH": "", "PYTHONPATH": ""},
    )
    found = re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.MULTILINE)
    assert found == [("11", "assignment"), ("12", "call-arg"), ("13", "call-arg")], result.stdout + result.stderr
