"""The blocks of every architecture, on tiny random configurations."""

import pytest
import transformers as tf
from architectures import ARCHITECTURES, SIZE
from tiny import bert, llama
from torch import nn

from hf_lsam.blocks import everything, find_blocks, find_candidates


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_architecture(name):
    model_class, config, count, first = ARCHITECTURES[name]
    model = model_class(config)
    blocks = find_blocks(model)
    assert len(blocks) == count
    assert first is None or next(iter(blocks)) == first
    assert all(model.get_submodule(name) is module for name, module in blocks.items())
    candidates = find_candidates(model, blocks, None)
    assert [candidate.name for candidate in candidates] == list(blocks)
    assert [candidate.first_block for candidate in candidates] == list(range(count))


def test_albert_is_refused_with_a_way_out():
    model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**SIZE, embedding_size=16))
    with pytest.raises(ValueError, match="at least 2 .*ALBERT.*block_pattern.*block_selection='all'"):
        find_candidates(model, find_blocks(model), None)


def test_albert_works_by_its_way_out():
    model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**SIZE, embedding_size=16))
    blocks = find_blocks(model)
    candidates = find_candidates(model, blocks, r".*\.(query|key|value|ffn|ffn_output)")
    assert len(candidates) == 5
    assert len(everything(model, blocks)[0].parameters) == len(list(model.parameters()))


def test_one_trainable_block_is_refused():
    model = bert(blocks=3)
    for index in range(2):
        model.bert.encoder.layer[index].requires_grad_(False)
    with pytest.raises(ValueError, match="1 of the 3 blocks"):
        find_candidates(model, find_blocks(model), None)


def test_frozen_blocks_and_weights_do_not_count():
    model = bert(blocks=4)
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.encoder.layer[2].attention.requires_grad_(False)
    candidates = find_candidates(model, find_blocks(model), None)
    assert [candidate.first_block for candidate in candidates] == [0, 1, 2, 3]
    assert [candidate.is_trained for candidate in candidates] == [True, False, True, True]
    whole, none, part, _ = (candidate.size for candidate in candidates)
    assert none == 0 and part == whole - sum(p.numel() for p in model.bert.encoder.layer[2].attention.parameters())


def test_plain_torch_model():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    model = nn.Sequential(nn.Linear(4, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 2))
    assert list(find_blocks(model)) == ["1.layers.0", "1.layers.1", "1.layers.2"]


def test_pattern_names_whole_modules():
    model = bert(blocks=4)
    blocks = find_blocks(model)
    candidates = find_candidates(model, blocks, r"bert\.encoder\.layer\.[13]\.attention")
    assert [candidate.name for candidate in candidates] == [
        "bert.encoder.layer.1.attention",
        "bert.encoder.layer.3.attention",
    ]
    assert [candidate.first_block for candidate in candidates] == [1, 3]
    # Of nested matches the outer one counts, and the model itself is none.
    assert [candidate.name for candidate in find_candidates(model, blocks, ".*")] == ["bert", "classifier"]


def test_pattern_that_matches_nothing_is_refused():
    model = bert()
    with pytest.raises(ValueError, match="block_pattern 'layer.0' matches no module .*for instance"):
        find_candidates(model, find_blocks(model), "layer.0")


def test_example_names_in_the_message_match():
    model = bert()
    with pytest.raises(ValueError) as raised:
        find_candidates(model, find_blocks(model), "nothing")
    example = str(raised.value).split("for instance ")[1].split(", ")[0].strip("'").replace("\\\\", "\\")
    assert len(find_candidates(model, find_blocks(model), example)) == 1


def test_weights_outside_the_blocks_count_as_used_by_all():
    model = llama()
    blocks = find_blocks(model)
    (head,) = find_candidates(model, blocks, "lm_head")
    assert head.first_block == 0
    assert head.blocks == frozenset(range(4))
    # The head multiplies with the tied embeddings; an embedding alone looks up.
    assert head.size == model.lm_head.weight.numel()
    (embeddings,) = find_candidates(bert(), find_blocks(bert()), r"bert\.embeddings\.word_embeddings")
    assert embeddings.size == 0


def test_a_shared_parameter_belongs_to_one_candidate():
    model = bert(blocks=3)
    layers = model.bert.encoder.layer
    layers[2].output.dense.weight = layers[1].output.dense.weight
    candidates = find_candidates(model, find_blocks(model), None)
    shared = layers[1].output.dense.weight
    assert [any(p is shared for p in candidate.parameters) for candidate in candidates] == [False, True, False]
    assert candidates[1].blocks == {1, 2}


def test_blocks_of_an_adapter_are_those_of_its_base():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    candidates = find_candidates(model, find_blocks(model), None)
    assert [candidate.name for candidate in candidates] == [
        f"base_model.model.bert.encoder.layer.{index}" for index in range(4)
    ]
    adapters = [[p for n, p in block.named_parameters() if "lora_" in n] for block in find_blocks(model).values()]
    assert [candidate.size for candidate in candidates] == [sum(p.numel() for p in own) for own in adapters]
