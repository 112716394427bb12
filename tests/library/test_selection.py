"""Which blocks are selected, and what that is predicted to cost."""

import itertools
import random

import peft
import pytest
from tiny import bert, llama, qwen2

from hf_lsam import LSAMConfig, reference
from hf_lsam.blocks import Candidate, everything, find_blocks, find_candidates
from hf_lsam.costs import CostModel
from hf_lsam.selection import check_selection, select


def equal_blocks(count, size=100):
    """Candidates and costs of `count` equal trained blocks and nothing else."""
    candidates = [Candidate(f"block.{index}", (), frozenset({index}), size) for index in range(count)]
    return candidates, CostModel(tuple(size * (count - first) for first in range(count)), 3 * count * size)


@pytest.mark.parametrize("first, k", [(0, 2), (10, 2), (6, 4), (11, 1), (0, 12)])
def test_overhead_of_equal_blocks_is_the_formula(first, k):
    candidates, costs = equal_blocks(12)
    chosen = [candidates[first], *candidates[12 - k + 1 :]]
    assert costs.overhead(chosen) == pytest.approx((2 * (12 - first) + k) / 36)


def test_overhead_without_replay_runs_every_block_forward():
    candidates, costs = equal_blocks(12)
    assert costs.overhead(candidates[10:], replayed=False) == pytest.approx((12 + 2 + 2) / 36)
    assert costs.overhead([]) == 0


def costs_of(model):
    blocks = find_blocks(model)
    return find_candidates(model, blocks, None), CostModel.of(model, blocks), everything(model, blocks)


def test_everything_costs_one_plain_step():
    for model in (bert(), llama()):
        _, costs, all_of_it = costs_of(model)
        assert costs.overhead(all_of_it) == pytest.approx(1.0)


def test_costs_are_counted_from_real_parameters():
    model = llama(blocks=4)
    candidates, costs, _ = costs_of(model)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert costs.plain == 3 * (4 * block + head)
    assert costs.overhead(candidates[3:]) == pytest.approx((2 * (block + head) + block) / costs.plain)


def test_frozen_parameters_count_as_frozen():
    """With next to no weight gradients, as under LoRA, replay from block s costs about (N - s) / N of a step."""
    model = llama(blocks=4)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.requires_grad_(True)
    candidates, costs, _ = costs_of(model)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert costs.plain == 2 * (4 * block + head) + 4 * 16
    assert costs.overhead(candidates[2:3]) == pytest.approx((2 * (2 * block + head) + 16) / costs.plain)


def test_the_original_beside_a_trained_copy_of_a_module_costs_nothing():
    """PEFT keeps both of a module of `modules_to_save`, and runs the copy only."""
    targets = ["q_proj", "v_proj"]
    without = peft.get_peft_model(qwen2(), peft.LoraConfig(r=2, target_modules=targets))
    copied = ["lm_head", "down_proj"]
    model = peft.get_peft_model(qwen2(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=copied))
    (_, costs, _), (_, costs_without, _) = costs_of(model), costs_of(without)
    assert costs.passed == costs_without.passed
    layers = model.base_model.model.model.layers
    wrapped = [model.base_model.model.lm_head, *(layer.mlp.down_proj for layer in layers)]
    assert costs.plain == costs_without.plain + sum(module.original_module.weight.numel() for module in wrapped)


def test_frozen_bottom_needs_no_input_gradients():
    model = bert(blocks=4)
    model.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:2]:
        layer.requires_grad_(False)
    _, costs, _ = costs_of(model)
    block = sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    head = sum(p.numel() for module in (model.bert.pooler, model.classifier) for p in module.parameters())
    outside = head + sum(p.numel() for p in model.bert.embeddings.LayerNorm.parameters())
    assert costs.plain == (4 * block + outside) + (2 * block + outside) + (2 * block + head)


def chosen(squared_norms, **settings):
    candidates, costs = equal_blocks(len(squared_norms))
    return select(LSAMConfig(**settings), candidates, costs, squared_norms)


def test_top_k_and_last():
    norms = [5.0, 1.0, 9.0, 3.0]
    assert chosen(norms, num_perturbed_blocks=2) == [0, 2]
    assert chosen(norms, num_perturbed_blocks=None) == [0, 1, 2, 3]
    assert chosen(norms, block_selection="last", num_perturbed_blocks=3) == [1, 2, 3]
    assert chosen(norms, block_selection="last", num_perturbed_blocks=None) == [0, 1, 2, 3]


@pytest.mark.parametrize("rule", ["top_k", "last", "budget"])
def test_a_block_without_gradient_is_never_selected(rule):
    norms = [5.0, 1.0, 0.0, 0.0]
    assert chosen(norms, block_selection=rule, num_perturbed_blocks=4, max_overhead=1.0) == [0, 1]


@pytest.mark.parametrize("k", [None, 1, 3])
def test_budget_is_the_best_of_all_sets(k):
    generator = random.Random(0)
    for count, overhead in itertools.product((4, 7), (0.2, 0.35, 0.6, 0.8, 1.0)):
        candidates, costs = equal_blocks(count)
        config = LSAMConfig(block_selection="budget", max_overhead=overhead, num_perturbed_blocks=k)
        if costs.overhead(candidates[-1:]) > overhead:
            continue
        literal = reference.budget(overhead, k, [100] * count, 0)
        for _ in range(20):
            norms = [generator.expovariate(1.0) for _ in range(count)]
            found = select(config, candidates, costs, [norm**2 for norm in norms])
            assert found == sorted(literal(norms))
            assert costs.overhead(candidates[index] for index in found) <= overhead


def test_budget_with_blocks_of_several_sizes_keeps_within():
    generator = random.Random(1)
    sizes = [400, 100, 300, 50, 200]
    candidates = [Candidate(str(index), (), frozenset({index}), size) for index, size in enumerate(sizes)]
    costs = CostModel(tuple(sum(sizes[first:]) for first in range(5)), 3 * sum(sizes))
    for overhead in (0.2, 0.4, 0.7):
        config = LSAMConfig(block_selection="budget", max_overhead=overhead, num_perturbed_blocks=None)
        for _ in range(50):
            found = select(config, candidates, costs, [generator.random() for _ in sizes])
            assert found and costs.overhead(candidates[index] for index in found) <= overhead


def test_more_blocks_than_there_are_is_refused():
    candidates, costs = equal_blocks(4)
    with pytest.raises(ValueError, match="num_perturbed_blocks=5, but the model has 4 candidates.*Lower it"):
        check_selection(LSAMConfig(num_perturbed_blocks=5), candidates, costs)
    check_selection(LSAMConfig(num_perturbed_blocks=4), candidates, costs)
    check_selection(LSAMConfig(num_perturbed_blocks=5, block_selection="all"), candidates, costs)


def test_a_budget_too_small_for_any_block_is_refused():
    candidates, costs = equal_blocks(4)
    with pytest.raises(ValueError, match=r"max_overhead=0.24 is too small.*block.3, costs 0.250"):
        check_selection(LSAMConfig(block_selection="budget", max_overhead=0.24), candidates, costs)
    check_selection(LSAMConfig(block_selection="budget", max_overhead=0.25), candidates, costs)
