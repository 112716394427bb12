"""
DeepSpeed: training under ZeRO 1 and 2 equals the run without it.

It needs DeepSpeed, which no extra of this project installs: `pip install deepspeed==0.19.8`, then
`pytest tests/library/test_deepspeed.py`. It needs no GPU.
"""

import importlib.util
import json
import math

import pytest
import ranks
import ranks_deepspeed
import torch
from deepspeed_cases import BF16, BF16_TWO_PASSES, ONE_PASS, RESUMED, STILL, TWO_PASSES, cases, faults, literal_cases
from launching import launch
from test_split import Ragged
from tiny import Examples, arguments, assert_equal, bert, blocks_of, largest_difference, weights
from tiny_passes import distance, length, share_of_rounding

from hf_lsam import LSAMConfig, LSAMTrainer, reference
from hf_lsam.perturbation import norms
from hf_lsam.rounding import round_stochastically

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; pip install deepspeed==0.19.8 runs this on a CPU",
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def launched(request, tmp_path_factory) -> tuple[int, list[dict]]:
    """The number of processes, and what each of them trained in one launch."""
    folder = tmp_path_factory.mktemp("deepspeed")
    equal = cases() | (faults() if request.param == 2 else {})
    trained = {name: (options, ONE_PASS) for name, options in BF16.items()} if request.param == 1 else {}
    trained |= {name: (options, TWO_PASSES) for name, options in (BF16_TWO_PASSES | STILL).items()}
    (folder / "cases.json").write_text(json.dumps(dict(equal=equal, resumed=RESUMED, trained=trained)))
    launch(ranks_deepspeed.__file__, folder, request.param, timeout=600, DS_ACCELERATOR="cpu")
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_all_processes_hold_the_same_weights(launched):
    _, results = launched
    for name in results[0]:
        assert_equal(results[0][name], results[-1][name])


@pytest.mark.parametrize("name", list(cases()))
def test_zero_steps_as_one_process_without_deepspeed(name, launched, tmp_path):
    """
    From equal weights, up to rounding: DeepSpeed's gradients are float32, and sums over its buckets round elsewhere.

    Of steps that climb what another one climbed for, the rounding would add up; those are left out.
    """
    processes, results = launched
    case = cases()[name]
    batch = case["arguments"]["per_device_train_batch_size"] * processes
    options = case["arguments"] | {"per_device_train_batch_size": batch}
    del options["deepspeed"]
    model = ranks.MODELS[case["model"]]()
    states = [weights(model)]
    states += [{key: results[0][name][f"{step}.{key}"] for key in states[0]} for step in range(4)]
    single, plain = ranks_deepspeed.States(states), ranks_deepspeed.States(states)
    ranks.train(case | {"arguments": options}, tmp_path, callbacks=[single])
    ranks.train(case | {"arguments": options, "config": dict(block_selection="none")}, tmp_path, callbacks=[plain])
    two = case["config"].get("ascent_gradient") != "previous"
    climbs = case["config"].get("perturb_interval", 1)
    assert results[0][name]["skipped"] == 0
    for step in range(4 if climbs == 2 or two else 2):
        # Of the two passes, and of the weights themselves.
        rounding = 2 * share_of_rounding(model, torch.float32) * distance(single.noted[step], states[step])
        rounding += torch.finfo(torch.float32).eps * length(states[step])
        assert distance(states[step + 1], single.noted[step]) <= rounding
        assert (distance(single.noted[step], plain.noted[step]) > 100 * rounding) == (two or step == climbs)


@pytest.mark.parametrize("name", literal_cases())
def test_two_passes_step_as_the_equations_say(name, launched):
    """In float64, on the union of the batches of all processes and micro-batches, from the weights of each step."""
    processes, results = launched
    case = cases()[name]
    model = ranks.MODELS[case["model"]]()
    states = [weights(model)]
    states += [{key: results[0][name][f"{step}.{key}"] for key in states[0]} for step in range(4)]
    data = Ragged(48, language_model=True) if case["model"] == "llama" else Examples(48)
    options, config = case["arguments"], case["config"]
    size = options["per_device_train_batch_size"] * processes * options.get("gradient_accumulation_steps", 1)
    model = model.double().train()
    blocks = blocks_of(model)
    rule = reference.top_k(2)
    if config.get("block_selection") == "all":
        blocks, rule = [reference.trainable(model)], reference.top_k(1)
    for step in range(4):
        model.load_state_dict(states[step])
        # An epoch has 48 rows, which are a whole number of steps.
        batch = data.batch(step * size % 48, size)
        mixed = reference.lsam_gradient(model, [batch], blocks, 0.5, config.get("alpha", 1.0), rule)
        clip = min(1.0, (options.get("max_grad_norm", 1.0) or math.inf) / reference.norm(list(mixed.values())))
        moves = {n: -0.05 * clip * mixed[p] for n, p in model.named_parameters()}
        moved = {n: states[step + 1][n].double() - states[step][n].double() for n in moves}
        rounding = 2 * share_of_rounding(model, torch.float32) * length(moves)
        rounding += torch.finfo(torch.float32).eps * length(states[step])
        assert distance(moved, moves) <= rounding


@pytest.mark.parametrize("launched", [2], indirect=True, ids=["two-processes"])
@pytest.mark.parametrize("stage", [1, 2])
def test_pass_2_changes_the_gradient_of_two_blocks_only(stage, launched):
    _, results = launched
    plain, mixed = results[0][f"plain-{stage}"], results[0][f"two-passes-{stage}"]
    first = [name for name in plain if name.startswith("0.")]
    changed = {tuple(name.split(".")[1:5]) for name in first if not torch.equal(plain[name], mixed[name])}
    assert len(changed) == 2 and {name[:3] for name in changed} == {("bert", "encoder", "layer")}


@pytest.mark.parametrize("launched", [2], indirect=True, ids=["two-processes"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_fault_in_one_process_leaves_both_in_step(stage, launched):
    """Both end. DeepSpeed leaves out a step whose gradient is no number; where that of pass 2 is none, it is plain."""
    _, results = launched
    of = {name: results[1][f"{name}-{stage}"] for name in ("pass-1", "pass-2", "error", "plain", "two-passes")}
    assert [int(of[name]["skipped"]) for name in ("pass-1", "pass-2", "error")] == [1, 1, 0]
    first = [name for name in of["plain"] if name.startswith("0.")]
    begun = {f"0.{name}": value for name, value in weights(bert()).items()}
    assert_equal(begun, {name: of["pass-1"][name] for name in first})
    assert_equal({name: of["plain"][name] for name in first}, {name: of["pass-2"][name] for name in first})
    assert_equal({name: of["two-passes"][name] for name in first}, {name: of["error"][name] for name in first})
    assert largest_difference(of["two-passes"], of["error"]) < 1e-5


@pytest.mark.parametrize("name", list(STILL))
def test_weights_are_put_back_after_pass_2(name, launched):
    _, results = launched
    start = bert().bfloat16() if "bf16" in name else bert()
    noted = {n: results[0][name][f"3.start.{n}"] for n, _ in start.named_parameters()}
    moved = {n: results[0][name][f"3.pass.{n}"] for n in noted}
    assert_equal({n: p.detach() for n, p in start.named_parameters()}, noted)
    assert_equal(noted, {n: results[0][name][n] for n in noted})
    assert largest_difference(noted, moved) > 0


@pytest.mark.parametrize("name", list(RESUMED))
def test_a_resumed_run_equals_one_that_went_on(name, launched):
    _, results = launched
    assert_equal(results[0][name], results[0][f"{name}-again"])


@pytest.mark.parametrize("stage", [1, 2])
def test_pass_2_is_replayed_as_without_deepspeed(stage, launched, tmp_path):
    _, results = launched
    options, config = RESUMED[f"resumed-last-{stage}"]
    options = {name: value for name, value in options.items() if name != "deepspeed"}
    trainer = LSAMTrainer(
        model=bert(), args=arguments(tmp_path, **options), train_dataset=Examples(48), lsam_config=LSAMConfig(**config)
    )
    trainer.train()
    assert results[0][f"resumed-last-{stage}"]["overhead"] == trainer._lsam.overhead < 0.6


@pytest.mark.parametrize("launched", [1], indirect=True, ids=["one-process"])
@pytest.mark.parametrize("name", list(BF16))
def test_bf16_perturbs_the_weights_of_the_model_and_updates_those_of_the_optimizer(name, launched):
    """bf16 weights are moved and restored, and the gradient there updates float32 ones, much as this loop does."""
    _, results = launched
    model = bert().bfloat16()
    layers, trained, data = model.bert.encoder.layer, dict(model.named_parameters()), Examples(48)
    masters, ascent = {n: p.detach().float() for n, p in trained.items()}, {}
    for step in range(4):
        start, moved = ({n: results[0][name][f"{step}.{at}.{n}"] for n in trained} for at in ("start", "pass"))
        assert_rounded_alike(start, masters)
        expected, draws = dict(start), torch.Generator().manual_seed(step)
        length = norms(list(ascent.values())).double().square().sum().sqrt() if ascent else 1.0
        for n, g in ascent.items():
            exact = start[n].float().add_(g, alpha=float(0.5 / length))
            expected[n] = round_stochastically(exact, torch.bfloat16, draws)
        assert_rounded_alike(moved, expected)
        # From here on at the weights of that pass, so that no step builds on the rounding of another.
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(moved[n])
        model.zero_grad()
        model(**data.batch(4 * step, 4)).loss.backward()
        sizes = [sum(p.grad.float().square().sum() for p in layer.parameters()) for layer in layers]
        chosen = {p for index in sorted(range(4), key=lambda i: -sizes[i])[:2] for p in layers[index].parameters()}
        ascent = {n: p.grad.clone() for n, p in trained.items() if p in chosen}
        norm = sum(p.grad.float().square().sum() for p in trained.values()) ** 0.5
        for n, p in trained.items():
            masters[n].sub_(p.grad.float(), alpha=0.05 / max(1.0, float(norm)))
    assert_rounded_alike({n: results[0][name][n] for n in trained}, masters)


@pytest.mark.parametrize("launched", [1], indirect=True, ids=["one-process"])
@pytest.mark.parametrize("name", list(BF16_TWO_PASSES))
def test_two_passes_in_bf16_mix_the_gradients_that_update_float32_weights(name, launched):
    _, results = launched
    model = bert().bfloat16()
    layers, trained, data = model.bert.encoder.layer, dict(model.named_parameters()), Examples(48)
    masters = {n: p.detach().float() for n, p in trained.items()}

    def gradient(at: dict, step: int) -> dict:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(at[n])
        model.zero_grad()
        model(**data.batch(4 * step, 4)).loss.backward()
        return {n: p.grad.clone() for n, p in trained.items()}

    for step in range(4):
        start, moved = ({n: results[0][name][f"{step}.{at}.{n}"] for n in trained} for at in ("start", "pass"))
        assert_rounded_alike(start, masters)
        plain = gradient(start, step)
        sizes = [sum(p.grad.float().square().sum() for p in layer.parameters()) for layer in layers]
        chosen = {p for index in sorted(range(4), key=lambda i: -sizes[i])[:2] for p in layers[index].parameters()}
        selected = [n for n, p in trained.items() if p in chosen]
        size = norms([plain[n] for n in selected]).double().square().sum().sqrt()
        expected, draws = dict(start), torch.Generator().manual_seed(step)
        for n in selected:
            exact = start[n].float().add_(plain[n], alpha=float(0.5 / size))
            expected[n] = round_stochastically(exact, torch.bfloat16, draws)
        assert_rounded_alike(moved, expected)
        there = gradient(moved, step)
        mixed = plain | {n: plain[n].lerp(there[n], 0.7) for n in selected}
        norm = reference.norm(list(mixed.values()))
        for n in trained:
            masters[n].sub_(mixed[n].float(), alpha=0.05 / max(1.0, norm))
    assert_rounded_alike({n: results[0][name][n] for n in trained}, masters)


def assert_rounded_alike(rounded: dict, exact: dict) -> None:
    """The last bit of a float32 number, such as a norm, decides how next to no weight is rounded to bf16."""
    wrong = 0
    for name, right in exact.items():
        left, right = rounded[name].float(), right.float()
        wrong += int((left != right.bfloat16()).sum())
        tiny = torch.finfo(torch.float32).eps
        assert bool(((left - right).abs() <= torch.finfo(torch.bfloat16).eps * right.abs() + tiny).all()), name
    assert wrong <= sum(map(torch.numel, exact.values())) / 1000
