"""
DeepSpeed: the one-pass rule under ZeRO 1 and 2 equals the run without it, and what is not supported is refused.

What trains needs DeepSpeed, which no extra of this project installs: `pip install deepspeed==0.19.8`, then
`pytest tests/test_deepspeed.py`. It needs no GPU. The refusals are tested everywhere.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import ranks
import ranks_deepspeed
import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from launching import launch
from tiny import Examples, arguments, assert_equal, bert, weights
from tiny_passes import distance, length, share_of_rounding

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.perturbation import norms
from hf_lsam.rounding import round_stochastically

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; pip install deepspeed==0.19.8 runs this on a CPU",
)
ONE_PASS = dict(rho=0.5, ascent_gradient="previous")


def engine(stage: int, **settings) -> dict:
    """Settings of DeepSpeed; small buckets, so that a tiny model fills several."""
    zero = dict(stage=stage, reduce_bucket_size=1000, **settings.pop("zero", {}))
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(sizes, "auto") | dict(zero_optimization=zero) | settings


def cases() -> dict[str, dict]:
    """By name what is trained under DeepSpeed and, with larger batches, in one process without it."""
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    clipped = dict(per_device_train_batch_size=2, max_grad_norm=0.1)
    everything = ONE_PASS | dict(block_selection="all", adaptive=True)
    made = {}
    for stage in (1, 2):
        zero = dict(deepspeed=engine(stage))
        unlike = dict(overlap_comm=True, contiguous_gradients=False, reduce_scatter=False)
        other = dict(deepspeed=engine(stage, zero=unlike))
        made |= {
            f"bert-{stage}": dict(model="bert", config=ONE_PASS, rows=48, arguments=accumulated | zero),
            f"llama-{stage}": dict(model="llama", config=ONE_PASS, rows=48, arguments=accumulated | zero),
            f"other-{stage}": dict(model="bert", config=ONE_PASS, rows=48, arguments=accumulated | other),
            f"asam-{stage}": dict(
                model="bert", config=everything, rows=48, arguments=dict(per_device_train_batch_size=2) | zero
            ),
            f"every-second-{stage}": dict(
                model="bert", config=ONE_PASS | dict(perturb_interval=2), rows=48, arguments=clipped | zero
            ),
        }
    return made


RESUMED = {f"resumed-{s}": (dict(deepspeed=engine(s)), ONE_PASS) for s in (1, 2)}
BF16 = {
    "bf16-1": dict(deepspeed=engine(1, bf16=dict(enabled=True)), bf16=True),
    "bf16-2": dict(deepspeed=engine(2, bf16=dict(enabled=True)), bf16=True),
    # ZeRO 1 with this is another class of DeepSpeed's, `BF16_Optimizer`.
    "bf16-1-accumulated-in-float32": dict(
        deepspeed=engine(1, bf16=dict(enabled=True), data_types=dict(grad_accum_dtype="fp32")), bf16=True
    ),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def launched(request, tmp_path_factory) -> tuple[int, list[dict]]:
    """The number of processes, and what each of them trained in one launch."""
    folder = tmp_path_factory.mktemp("deepspeed")
    trained = {name: (options, ONE_PASS) for name, options in BF16.items()} if request.param == 1 else {}
    (folder / "cases.json").write_text(json.dumps(dict(equal=cases(), resumed=RESUMED, trained=trained)))
    launch(ranks_deepspeed.__file__, folder, request.param, timeout=600, DS_ACCELERATOR="cpu")
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@needs_deepspeed
def test_all_processes_hold_the_same_weights(launched):
    _, results = launched
    for name in results[0]:
        assert_equal(results[0][name], results[-1][name])


@needs_deepspeed
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
    climbs = case["config"].get("perturb_interval", 1)
    for step in range(4 if climbs == 2 else 2):
        # Of the two passes, and of the weights themselves.
        rounding = 2 * share_of_rounding(model, torch.float32) * distance(single.noted[step], states[step])
        rounding += torch.finfo(torch.float32).eps * length(states[step])
        assert distance(states[step + 1], single.noted[step]) <= rounding
        assert (distance(single.noted[step], plain.noted[step]) > 100 * rounding) == (step == climbs)


@needs_deepspeed
@pytest.mark.parametrize("name", list(RESUMED))
def test_a_resumed_run_equals_one_that_went_on(name, launched):
    _, results = launched
    assert_equal(results[0][name], results[0][f"{name}-again"])


@needs_deepspeed
@pytest.mark.parametrize("launched", [1], indirect=True, ids=["one-process"])
@pytest.mark.parametrize("name", list(BF16))
def test_bf16_perturbs_the_weights_of_the_model_and_updates_those_of_the_optimizer(name, launched):
    """bf16 weights are moved and restored, and the gradient there updates float32 ones, much as this loop does."""
    _, results = launched
    model = bert().bfloat16()
    layers, trained, data = model.bert.encoder.layer, dict(model.named_parameters()), Examples(16)
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


def assert_rounded_alike(rounded: dict, exact: dict) -> None:
    """The last bit of a float32 number, such as a norm, decides how next to no weight is rounded to bf16."""
    wrong = 0
    for name, right in exact.items():
        left, right = rounded[name].float(), right.float()
        wrong += int((left != right.bfloat16()).sum())
        tiny = torch.finfo(torch.float32).eps
        assert bool(((left - right).abs() <= torch.finfo(torch.bfloat16).eps * right.abs() + tiny).all()), name
    assert wrong <= sum(map(torch.numel, exact.values())) / 1000


REFUSED = {
    "ZeRO stage 0": (engine(0), ONE_PASS),
    "ZeRO stage 3": (engine(3), ONE_PASS),
    "ascent_gradient='previous'": (engine(2), {}),
    "offload_optimizer.device='cpu'": (engine(2, zero=dict(offload_optimizer=dict(device="cpu"))), ONE_PASS),
    "round_robin_gradients=True": (engine(2, zero=dict(round_robin_gradients=True)), ONE_PASS),
    "zenflow=": (engine(2, zero=dict(zenflow=dict(topk_ratio=0.1))), ONE_PASS),
    "fp16.enabled=True": (engine(2, fp16=dict(enabled=True)), ONE_PASS),
    "torch_autocast.dtype='float16'": (engine(2, torch_autocast=dict(enabled=True, dtype="float16")), ONE_PASS),
    "tensor_parallel.autotp_size=2": (engine(2, tensor_parallel=dict(autotp_size=2)), ONE_PASS),
    "compile.deepcompile=True": (engine(2, compile=dict(deepcompile=True)), ONE_PASS),
    "compression_training=": (engine(2, compression_training=dict(layer_reduction=dict(enabled=True))), ONE_PASS),
    "Muon": (engine(2, optimizer=dict(type="Muon")), ONE_PASS),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_the_rest_is_refused_before_training(reason, tmp_path, monkeypatch):
    settings, config = REFUSED[reason]
    trainer = LSAMTrainer(
        model=bert(), args=arguments(tmp_path), train_dataset=Examples(16), lsam_config=LSAMConfig(**config)
    )
    start, state = weights(trainer.model), trainer.accelerator.state
    monkeypatch.setattr(state, "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setattr(state, "deepspeed_plugins", DeepSpeedPlugin(hf_ds_config=settings), raising=False)
    with pytest.raises(NotImplementedError, match="block_selection='none'") as raised:
        trainer.train()
    assert reason in str(raised.value)
    assert_equal(start, weights(trainer.model))


def test_the_launch_file_asks_for_zero_2_without_offload():
    path = Path(__file__).parents[1] / "accelerate_configs" / "deepspeed_zero2.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.DEEPSPEED
    plugin = DeepSpeedPlugin(zero_stage=config.deepspeed_config["zero_stage"])
    assert plugin.zero_stage == 2 and config.deepspeed_config["offload_optimizer_device"] == "none"
