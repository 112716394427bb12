"""What is trained under DeepSpeed, by name, for `test_deepspeed.py`."""

import math

from tiny import checkpointed

ONE_PASS = dict(rho=0.5, ascent_gradient="previous")
TWO_PASSES = dict(rho=0.5, alpha=0.7)


def engine(stage: int, **settings) -> dict:
    """Settings of DeepSpeed; small buckets, so that a tiny model fills several."""
    zero = dict(stage=stage, reduce_bucket_size=1000, **settings.pop("zero", {}))
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(sizes, "auto") | dict(zero_optimization=zero) | settings


def cases() -> dict[str, dict]:
    """By name what is trained under DeepSpeed and, with larger batches, in one process without it."""
    whole = dict(per_device_train_batch_size=2)
    accumulated = whole | dict(gradient_accumulation_steps=3)
    clipped = whole | dict(max_grad_norm=0.1)
    everything = ONE_PASS | dict(block_selection="all", adaptive=True)
    sam = dict(rho=0.5, block_selection="all")
    looksam = sam | dict(perturb_interval=2, reuse_correction=0.7)
    made = {}
    for stage in (1, 2):
        zero = dict(deepspeed=engine(stage))
        unlike = dict(overlap_comm=True, contiguous_gradients=False, reduce_scatter=False)
        other = dict(deepspeed=engine(stage, zero=unlike))
        for name, model, config, options in (
            ("bert", "bert", ONE_PASS, accumulated | zero),
            ("llama", "llama", ONE_PASS, accumulated | zero),
            ("other", "bert", ONE_PASS, accumulated | other),
            ("asam", "bert", everything, whole | zero),
            ("every-second", "bert", ONE_PASS | dict(perturb_interval=2), clipped | zero),
            ("two-passes", "bert", TWO_PASSES, whole | dict(max_grad_norm=0.0) | zero),
            ("two-passes-clipped", "bert", TWO_PASSES, clipped | zero),
            ("two-passes-accumulated", "llama", TWO_PASSES, clipped | accumulated | zero),
            ("two-passes-other", "bert", TWO_PASSES, accumulated | other),
            ("two-passes-checkpointed", "bert", TWO_PASSES, accumulated | zero | checkpointed(use_reentrant=True)),
            ("two-passes-sam", "bert", sam, accumulated | zero),
            ("two-passes-budget", "bert", TWO_PASSES | dict(block_selection="budget", max_overhead=0.7), whole | zero),
            ("looksam", "bert", looksam, clipped | zero),
        ):
            made[f"{name}-{stage}"] = dict(model=model, config=config, rows=48, arguments=options)
    return made


def literal_cases() -> list[str]:
    return [name for name in cases() if name.startswith("two-passes") and "budget" not in name]


def faults() -> dict[str, dict]:
    """The second of two processes has a loss that is no number in pass 1, in pass 2, or an error there."""
    made = {}
    for stage in (1, 2):
        made[f"plain-{stage}"] = cases()[f"two-passes-{stage}"] | dict(config=dict(block_selection="none"))
        for name, fault in (("pass-1", (1, math.nan)), ("pass-2", (4, math.inf)), ("error", (10, None))):
            made[f"{name}-{stage}"] = cases()[f"two-passes-{stage}"] | dict(faulty_ranks=[1], fault=fault)
    return made


RESUMED = {f"resumed-{s}": (dict(deepspeed=engine(s)), ONE_PASS) for s in (1, 2)}
for s in (1, 2):
    threefold = dict(gradient_accumulation_steps=3, per_device_train_batch_size=2)
    RESUMED[f"resumed-two-passes-{s}"] = (dict(deepspeed=engine(s)) | threefold, TWO_PASSES)
    RESUMED[f"resumed-last-{s}"] = (dict(deepspeed=engine(s)) | threefold, TWO_PASSES | dict(block_selection="last"))
    looksam = dict(rho=0.5, block_selection="all", perturb_interval=3, reuse_correction=0.7)
    RESUMED[f"resumed-looksam-{s}"] = (dict(deepspeed=engine(s)), looksam)
BF16 = {
    "bf16-1": dict(deepspeed=engine(1, bf16=dict(enabled=True)), bf16=True),
    "bf16-2": dict(deepspeed=engine(2, bf16=dict(enabled=True)), bf16=True),
    # ZeRO 1 with this is another class of DeepSpeed's, `BF16_Optimizer`.
    "bf16-1-accumulated-in-float32": dict(
        deepspeed=engine(1, bf16=dict(enabled=True), data_types=dict(grad_accum_dtype="fp32")), bf16=True
    ),
}
IN_FLOAT32 = engine(2, bf16=dict(enabled=True), data_types=dict(grad_accum_dtype="fp32"))
BF16_TWO_PASSES = {
    "two-passes-bf16-1": BF16["bf16-1"],
    "two-passes-bf16-2": BF16["bf16-2"],
    "two-passes-bf16-2-accumulated-in-float32": dict(deepspeed=IN_FLOAT32, bf16=True),
}
# With no learning rate, weights that are put back after pass 2 stay what they were.
STILL = {f"still-{name}": options | dict(learning_rate=0.0) for name, options in BF16_TWO_PASSES.items()}
STILL |= {f"still-{s}": dict(deepspeed=engine(s), learning_rate=0.0, max_grad_norm=0.1) for s in (1, 2)}
AUTOCAST = dict(torch_autocast=dict(enabled=True, dtype="bfloat16"))
STILL |= {f"still-autocast-{s}": dict(deepspeed=engine(s, **AUTOCAST), learning_rate=0.0) for s in (1, 2)}
