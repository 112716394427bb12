"""Two processes under DistributedDataParallel equal one process on the union of their batches."""

import json
import math
from pathlib import Path

import accelerate
import pytest
import ranks
import torch
from launching import launch
from packaging import version
from tiny import checkpointed, largest_difference

from hf_lsam import reference

METHODS = {
    "top-2": dict(rho=0.1, alpha=0.7),
    "sam": dict(rho=0.1, block_selection="all"),
    "looksam": dict(rho=0.1, block_selection="all", perturb_interval=3, reuse_correction=0.7),
    "one-pass": dict(rho=0.1, ascent_gradient="previous"),
    "priced": dict(rho=0.1, max_overhead=0.4),
}


SYNC_EACH = {"sync_each_batch": True}
TWO, ONE = dict(per_device_train_batch_size=2), dict(per_device_train_batch_size=4)
OWN = dict(rho=0.1, sharpness_scope="micro_batch", block_selection="last")

# What becomes of a set that two processes cannot share evenly. By name: its number of rows, the arguments, and the
# rows of each micro-batch of an epoch, of rank 0 and of rank 1, worked out by hand: Accelerate deals batches out in
# turn, and fills up from the beginning.
UNEVEN = {
    "a-rank-without-a-batch": (10, {}, [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 9], [0, 1])]),
    "a-last-batch-of-one-row": (9, {}, [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 0], [1, 2])]),
    "a-short-last-window": (
        17,
        dict(gradient_accumulation_steps=3),
        [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 9], [10, 11]), ([12, 13], [14, 15]), ([16, 0], [1, 2])],
    ),
    "drop-last": (11, dict(dataloader_drop_last=True), [([0, 1], [2, 3]), ([4, 5], [6, 7])]),
    "not-even": (
        11,
        dict(accelerator_config={"even_batches": False}),
        [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 9], [10])],
    ),
    "split": (
        10,
        dict(per_device_train_batch_size=4, accelerator_config={"split_batches": True}),
        [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 9], [0, 1])],
    ),
    "dispatched": (
        11,
        dict(accelerator_config={"dispatch_batches": True}),
        [([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8, 9], [10, 0])],
    ),
}

# In pass `call` of rank 1, what the loss is multiplied by, or `None` for an error. The calls of the first step are
# pass 1, two full passes at the weights and at the moved ones, and a replayed one there; those of later steps are pass
# 1 and pass 2, and in the second step, which begins with a later block, the full passes again. Then, how often each
# rank skips.
FAULTS = {
    "full-pass-differs": ("batch", (2, 2.0), (0, 0)),
    "replay-differs": ("batch", (4, 2.0), (0, 0)),
    "replay-differs-in-a-loss-that-communicates": ("batch", (4, 2.0), (0, 0)),
    "full-pass-fails": ("batch", (2, None), (0, 0)),
    "full-pass-at-moved-weights-fails": ("batch", (3, None), (0, 0)),
    "replay-fails": ("batch", (4, None), (0, 0)),
    "later-replay-fails": ("batch", (10, None), (0, 0)),
    "pass-1-not-finite": ("batch", (1, math.nan), (4, 4)),
    "pass-2-not-finite": ("batch", (4, math.inf), (1, 1)),
    "own-full-pass-fails": ("micro_batch", (2, None), (0, 0)),
    "own-pass-1-not-finite": ("micro_batch", (1, math.nan), (4, 4)),
    "own-pass-1-zero": ("micro_batch", (1, 0.0), (0, 1)),
    "own-pass-2-not-finite": ("micro_batch", (4, math.inf), (0, 1)),
}
# Those in which the loss communicates, so that both ranks have to run as many passes.
COMMUNICATING = {"replay-differs-in-a-loss-that-communicates"}


def cases() -> dict[str, dict]:
    """By name what two processes train; `single` is what the one process does that is to equal them."""
    made = {}
    for model in ("bert", "llama"):
        for name in METHODS if model == "bert" else ("top-2", "one-pass"):
            config = METHODS[name]
            two, one = TWO | dict(gradient_accumulation_steps=3), ONE | dict(gradient_accumulation_steps=3)
            made[f"{model}-{name}"] = dict(model=model, config=config, rows=48, arguments=two, single=one)
    base = dict(model="bert", config=METHODS["top-2"], rows=16)
    made["no-accumulation"] = base | dict(arguments=TWO, single=ONE, profiled=True)
    made["asks-for-all-gradients"] = base | dict(arguments=TWO, single=ONE, asks_for_all=True)
    made["plain"] = made["no-accumulation"] | dict(config=dict(block_selection="none"))
    each = dict(gradient_accumulation_steps=3, accelerator_config={"gradient_accumulation_kwargs": SYNC_EACH})
    made["synced-at-each-batch"] = base | dict(rows=48, arguments=TWO | each, single=ONE | each)
    for flag in (True, False):
        made[f"find-unused-{flag}"] = base | dict(arguments=TWO | dict(ddp_find_unused_parameters=flag), single=ONE)
    for reentrant in (True, False):
        two = TWO | checkpointed(use_reentrant=reentrant)
        made["reentrant-checkpointing" if reentrant else "checkpointing"] = base | dict(arguments=two, single=ONE)
    # The union of the micro-batches of a step, each perturbed by its own gradient and on blocks that all agree on.
    one = TWO | dict(gradient_accumulation_steps=2)
    made["micro-batch"] = dict(model="bert", config=OWN, rows=16, arguments=TWO, single=one)
    two, one = TWO | dict(gradient_accumulation_steps=2), TWO | dict(gradient_accumulation_steps=4)
    made["micro-batch-accumulated"] = dict(model="bert", config=OWN, rows=32, arguments=two, single=one)
    made |= uneven_cases()
    return made


def uneven_cases() -> dict[str, dict]:
    """The cases of `UNEVEN`: as one batch of both ranks' rows, and where that differs, as one batch for each."""
    made = {}
    for name, (rows, options, by_rank) in UNEVEN.items():
        accumulation = options.get("gradient_accumulation_steps", 1)
        union = [first + second for first, second in by_rank]
        each = [rows for pair in by_rank for rows in pair]
        # Of BERT's loss, each rank takes the mean over its own rows; Llama's is the mean over all tokens of a step.
        runs = [("bert", "top-2", each if name == "not-even" else union)]
        if name in ("a-short-last-window", "not-even"):
            runs += [("llama", "top-2", union), ("bert", "own", each)]
        for model, config, micro_batches in runs:
            made[f"{name}-{model}-{config}"] = dict(
                model=model,
                config=OWN if config == "own" else METHODS[config],
                rows=rows,
                arguments=TWO | options,
                single=dict(gradient_accumulation_steps=accumulation * len(micro_batches) // len(by_rank)),
                by_rank=by_rank,
                micro_batches_of_one=micro_batches,
            )
    return made


def fault_cases() -> dict[str, dict]:
    """The faults of `FAULTS`, on rank 1 only."""
    configs = {"batch": METHODS["top-2"], "micro_batch": OWN}
    return {
        name: dict(
            model="bert",
            config=configs[scope],
            rows=16,
            arguments=TWO,
            faulty_ranks=[1],
            fault=fault,
            communicates=name in COMMUNICATING,
        )
        for name, (scope, fault, _) in FAULTS.items()
    }


def agreed_case() -> dict:
    """Micro-batches whose own gradients would select other blocks than those that the ranks agree on."""
    config = dict(rho=0.1, alpha=0.7, sharpness_scope="micro_batch")
    two = TWO | dict(gradient_accumulation_steps=2, max_grad_norm=0.0)
    return dict(model="bert", config=config, rows=32, arguments=two)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two processes saved of each case, all of them trained in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(cases() | fault_cases() | {"agreed": agreed_case()}))
    launch(ranks.__file__, folder)
    return folder


def of_both_ranks(trained: Path, name: str) -> list[dict]:
    """What the two processes saved of a case. They hold the same weights, and selected the same blocks."""
    results = [torch.load(trained / f"{name}.{rank}.pt") for rank in range(2)]
    first, second = (result["weights"] for result in results)
    assert all(torch.equal(first[key].nan_to_num(7), second[key].nan_to_num(7)) for key in first)
    return results


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_equal_one(name, trained, tmp_path):
    case = cases()[name]
    results = of_both_ranks(trained, name)
    assert results[0]["selected"] == results[1]["selected"]
    if "by_rank" in case:
        for rank, result in enumerate(results):
            epoch = [rows[rank] for rows in case["by_rank"]]
            assert result["rows"] == (4 * epoch)[: len(result["rows"])] and len(result["rows"]) > len(epoch)
    one = case | {"arguments": case["single"], "micro_batches": case.get("micro_batches_of_one")}
    single = ranks.train(one, tmp_path)
    assert largest_difference(results[0]["weights"], single["weights"]) < 1e-12


@pytest.mark.usefixtures("float64")
def test_each_rank_climbs_its_own_gradient_on_blocks_that_all_agree_on(trained):
    """By hand: the blocks are those with the largest mean of squared norms over the two micro-batches of a moment."""
    model, examples = ranks.MODELS["bert"]().train(), ranks.Examples(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    blocks = [list(block.parameters()) for block in model.bert.encoder.layer]
    agreed_otherwise = 0
    for step in range(4):
        mixed = []
        for moment in range(2):
            batches = [examples.batch(8 * step + 4 * moment + 2 * rank, 2) for rank in range(2)]
            plain = [reference.gradient(model, [batch]) for batch in batches]
            squares = [[reference.norm([own[p] for p in block]) ** 2 for block in blocks] for own in plain]
            chosen = reference.top_k(2)([sum(both) / 2 for both in zip(*squares, strict=True)])
            agreed_otherwise += sum(set(chosen) != set(reference.top_k(2)(own)) for own in squares)
            selected = [p for index in chosen for p in blocks[index]]
            for batch, own in zip(batches, plain, strict=True):
                there = reference.perturbed_gradient(model, [batch], selected, own, rho=0.1)
                mixed.append(own | {p: 0.3 * own[p] + 0.7 * there[p] for p in selected})
        mean = {p: torch.stack([gradients[p] for gradients in mixed]).mean(0) for p in mixed[0]}
        reference.update(model, mean, optimizer)
    assert agreed_otherwise > 0
    first, second = of_both_ranks(trained, "agreed")
    assert first["selected"] == second["selected"]
    assert largest_difference(first["weights"], ranks.weights(model)) < 1e-12


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_on_one_rank_leaves_both_in_step(name, trained):
    """The launch ends, and both hold the same weights: those of a run without the fault where only replay failed."""
    scope, (_, factor), skipped = FAULTS[name]
    first, second = of_both_ranks(trained, name)
    assert (first["skipped"], second["skipped"]) == skipped
    if factor in (None, 2.0):
        usual = of_both_ranks(trained, "no-accumulation" if scope == "batch" else "micro-batch")[0]
        assert largest_difference(first["weights"], usual["weights"]) < 1e-12


def test_pass_2_costs_one_all_reduce_of_the_selected_gradients(trained):
    block = sum(p.numel() for p in ranks.MODELS["bert"]().bert.encoder.layer[0].parameters())
    # And of three flags, such as whether to compare pass 2 on all ranks. To do so, a full pass 2 at the weights where
    # they are, whether it differs, and what of a replayed one does: at the first step, and where a later block is the
    # first.
    usual, compared = [3, 2 * block], [3, 2 * block, 1, 2, 2 * block]
    assert torch.load(trained / "bert-top-2.0.pt")["all_reduced"] == (compared + usual) * 2
    weights = sum(p.numel() for p in ranks.MODELS["bert"]().parameters())
    sam = [3, weights, 1, 2, weights] + [3, weights] * 3
    assert torch.load(trained / "bert-sam.0.pt")["all_reduced"] == sam
    assert torch.load(trained / "bert-one-pass.0.pt")["all_reduced"] == []


def test_nothing_else_is_sent_beyond_the_plain_step(trained):
    """Counted where the process group sends, so that what DistributedDataParallel sends is in it."""
    for rank in range(2):
        plain, perturbed = (torch.load(trained / f"{name}.{rank}.pt")["sent"] for name in ("plain", "no-accumulation"))
        assert plain["gloo:all_reduce"] > 0 and plain["gloo:broadcast"] > 0
        # Two steps compare pass 2, and two do not.
        assert perturbed == plain | {"gloo:all_reduce": plain["gloo:all_reduce"] + 2 * 5 + 2 * 2}


def test_micro_batch_scope_sends_norms_at_each_micro_batch_and_gradients_once_a_step(trained):
    parameters = [p.numel() for p in ranks.MODELS["bert"]().parameters()]
    a_step = [4, 4, len(parameters), sum(parameters)]
    assert torch.load(trained / "micro-batch-accumulated.0.pt")["all_reduced"] == a_step * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_what_would_leave_ranks_out_of_step_is_refused(rank, trained):
    refusals = json.loads((trained / f"refusals.{rank}.json").read_text())
    if version.parse(accelerate.__version__) >= version.parse("1.15"):
        assert "2 processes were launched, but each trains alone" in refusals["alone"]
        assert "use_cpu=True" in refusals["alone"]
    else:
        # There they may train together after all.
        together = refusals["alone"] == "not refused in 2 processes"
        assert together or "2 processes were launched, but each trains alone" in refusals["alone"]
    assert "even_batches" in refusals["uneven"] and "sharpness_scope='batch'" in refusals["uneven"]
