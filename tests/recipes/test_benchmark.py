"""The benchmark on a tiny model: every method takes its turns, and the bound is that of the cost model."""

import json
from functools import partial

import pytest
import torch
from tiny import Examples, arguments, bert, largest_difference, weights
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes import benchmark
from hf_lsam_recipes.support.cost.methods import METHODS
from hf_lsam_recipes.support.cost.peers import IN_TRAINER, PEERS, HandWrittenLoop
from hf_lsam_recipes.support.cost.workload import Rows, make_model

TINY = ["--num_hidden_layers", "4", "--hidden_size", "64", "--batch_size", "2", "--sequence_length", "8"]
TINY += ["--rounds", "1", "--steps", "1", "--memory_repeats", "0"]


def test_every_method(tmp_path, capsys):
    path = tmp_path / "cost.json"
    # One of 4 blocks costs more than a budget of 0.2.
    names = [name for name in [*METHODS, *IN_TRAINER, *PEERS] if name not in ("budget-0.1", "budget-0.2")]
    files = ["--output_file", str(path), "--picture", str(tmp_path / "cost.svg")]
    figures = benchmark.main([*TINY, "--methods", ",".join(names), *files])
    assert list(figures) == names
    assert figures["plain"]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in figures.values())
    bounds = {name: row["bound"] for name, row in figures.items()}
    assert bounds["plain"] == bounds["off"] == bounds["one-pass-2"] == 1
    assert bounds["sam"] == pytest.approx(2)
    assert bounds["looksam-5"] == pytest.approx(1.2)
    assert bounds["sam-every-4th"] == pytest.approx(1.25)
    assert 1 < bounds["last-1"] < bounds["last-2"] < bounds["last-4"] < 2
    assert bounds["budget-0.5"] <= 1.5
    assert figures["last-2"]["first_block"] == 2
    assert all(figures[name]["bound"] is None for name in (*IN_TRAINER, *PEERS))
    [saved] = json.loads(path.read_text())["runs"]
    assert saved["figures"] == figures
    assert saved["bounds"]["2"][2] == pytest.approx(bounds["last-2"])
    assert {"seeds", "commit", "versions", "machine"} <= saved["stamp"].keys()
    assert capsys.readouterr().out.count("\n| ") >= len(figures)
    picture = (tmp_path / "cost.svg").read_text()
    assert "first perturbed block" in picture or "<svg" in picture


def test_memory_is_that_of_a_process_for_each_method_and_runs_are_added_to_the_file(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"runs": [{"of": "before"}]}))
    options = ["--rounds", "0", "--memory_repeats", "1", "--methods", "plain,pasted-sam", "--output_file", str(path)]
    figures = benchmark.main([*TINY, *options])
    assert figures["plain"]["memory_ratio"] == 1
    assert 0.5 < figures["pasted-sam"]["memory_ratio"] < 2
    before, after = json.loads(path.read_text())["runs"]
    assert before == {"of": "before"} and after["figures"] == figures


def test_memory_is_measured_while_this_process_is_small(monkeypatch):
    """Linux counts into the peak of a new process what its parent had in memory when it was started."""
    order = []

    def noted(what):
        return lambda args, names: order.append(what) or {name: {what: 1} for name in names}

    monkeypatch.setattr(benchmark, "measure_times", noted("times"))
    monkeypatch.setattr(benchmark, "measure_memory", noted("memory"))
    benchmark.measure(benchmark.BenchmarkArguments(methods="plain,sam"))
    assert order == ["memory", "times"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("peer", ["pasted-sam", "pytorch_optimizer-sam"])
def test_a_peer_takes_sams_step(peer):
    args = benchmark.BenchmarkArguments(num_hidden_layers=2, hidden_size=64, batch_size=2, sequence_length=8)
    model, other = make_model(args), make_model(args)
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    [batch] = DataLoader(Rows(2, args, 30522), 2)
    HandWrittenLoop(peer, model, [batch], accumulation=1, bf16=False).run(1)

    optimizer = torch.optim.AdamW(other.parameters(), lr=5e-5, weight_decay=0.0)
    other(**batch).loss.backward()
    weights = list(other.parameters())
    starts, gradients = ([p.detach().clone() for p in weights], [p.grad.clone() for p in weights])
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.data.add_(gradient, alpha=0.05 / norm)
    optimizer.zero_grad()
    other(**batch).loss.backward()
    for weight, start in zip(weights, starts, strict=True):
        weight.data.copy_(start)
    optimizer.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert max(float((one - two).detach().abs().max()) for one, two in pairs) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("name", "selection"), [("sam-by-hand", "all"), ("last-1-by-hand", "last"), ("last-2-by-hand", "last")]
)
def test_a_step_by_hand_is_that_of_the_trainer(name, selection, accumulation, tmp_path):
    """Without dropout, whose draws the hand-written ones do not repeat."""
    states = []
    config = LSAMConfig(block_selection=selection, num_perturbed_blocks=1 if name.startswith("last-1") else 2)
    for kind, extra in ((IN_TRAINER[name], {}), (LSAMTrainer, {"lsam_config": config}), (Trainer, {})):
        options = dict(max_steps=1, gradient_accumulation_steps=accumulation, learning_rate=1e-2, optim="sgd")
        trainer = kind(model=bert().double(), args=arguments(tmp_path, **options), train_dataset=Examples(36), **extra)
        trainer.train()
        states.append(weights(trainer.model))
    by_hand, ours, plain = states
    assert largest_difference(by_hand, ours) < 1e-12 < 1e-6 < largest_difference(by_hand, plain)


def test_a_model_of_which_nothing_is_replayed_has_no_step_by_hand(tmp_path):
    with pytest.raises(ValueError, match="Of 2 blocks, the last 2 leave none to replay"):
        IN_TRAINER["last-2-by-hand"](model=bert(2), args=arguments(tmp_path))


def test_a_file_of_something_else_is_not_written_over(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"figures": 1}')
    with pytest.raises(ValueError, match="holds no runs of this benchmark"):
        benchmark.main([*TINY, "--methods", "plain", "--output_file", str(path)])
    assert path.read_text() == '{"figures": 1}'


def test_files_that_cannot_be_written_are_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", None)
    for setting in ("--output_file", "--picture"):
        with pytest.raises(
            ValueError, match=rf"{setting[2:]}=.*none/cost.json: .*none is not a folder that can be writt"
        ):
            benchmark.main([*TINY, setting, str(tmp_path / "none" / "cost.json")])
        with pytest.raises(ValueError, match=rf"{setting[2:]}=.* is a folder: name a file in it"):
            benchmark.main([*TINY, setting, str(tmp_path)])


def test_an_interruption_loses_no_run_of_before(tmp_path, monkeypatch):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"runs": [{"of": "before"}]}))
    monkeypatch.setattr(benchmark, "measure", lambda args: {"plain": {}})

    def stop(draft, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--methods", "plain", "--output_file", str(path)])
    assert json.loads(path.read_text()) == {"runs": [{"of": "before"}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden_size", "32"], "hidden_size must be a multiple of 64, the width of a head, but is 32"),
        (["--hidden_size", "100"], "hidden_size must be a multiple of 64"),
        (["--batch_size", "0"], "batch_size must be at least 1, but is 0"),
    ],
)
def test_sizes_that_no_model_has_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main([*TINY, *options])


@pytest.mark.parametrize("methods", ["plain,none-such", "sam"])
def test_unknown_methods_are_refused(methods):
    with pytest.raises(ValueError, match="it must include plain, and only names among"):
        benchmark.main([*TINY, "--methods", methods])


@pytest.mark.parametrize("torch_compile", ["whole", "regional"])
def test_a_configuration_with_random_weights_is_compiled(tmp_path, monkeypatch, torch_compile):
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(benchmark, "TrainingArguments", partial(TrainingArguments, torch_compile_backend="aot_eager"))
    options = ["--model_name_or_path", str(tmp_path), "--random_weights", "true", "--causal_lm", "true"]
    options += ["--torch_compile", torch_compile, "--methods", "plain,last-1,one-pass-2"]
    counters.clear()
    figures = benchmark.main([*TINY, *options])
    assert counters["stats"]["unique_graphs"] > 0
    assert (figures["last-1"]["bound"] == 2) == (torch_compile == "whole")
    assert all(row["seconds"] > 0 for row in figures.values())


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="torch_compile must be whole or regional, or left out, but is 'blocks'"):
        benchmark.main([*TINY, "--methods", "plain,sam", "--torch_compile", "blocks"])
    with pytest.raises(ValueError, match="leave pasted-sam, .* out of methods"):
        benchmark.main([*TINY, "--methods", "plain,pasted-sam", "--torch_compile", "whole"])
