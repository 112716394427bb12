"""The blocks of every architecture, on tiny random configurations."""

import pytest
import torch
import transformers as tf
from tiny import bert, llama
from torch import nn

from hf_lsam.blocks import everything, find_blocks, find_candidates

SIZE = dict(vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
DECODER = dict(num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0)

# name: (model class, configuration, number of blocks, first name, last name)
ARCHITECTURES = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**SIZE), 4, "bert.encoder.layer.0"),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**SIZE), 4, "roberta.encoder.layer.0"),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=32, dim=16, n_layers=4, n_heads=2, hidden_dim=32),
        4,
        "distilbert.transformer.layer.0",
    ),
    "deberta-v2": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(**SIZE, relative_attention=True, conv_kernel_size=3, pos_att_type=["c2p", "p2c"]),
        4,
        "deberta.encoder.layer.0",
    ),
    "electra": (
        tf.ElectraForSequenceClassification,
        tf.ElectraConfig(**SIZE, embedding_size=16),
        4,
        "electra.encoder.layer.0",
    ),
    "modernbert": (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(**SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        4,
        "model.layers.0",
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, n_positions=32),
        4,
        "transformer.h.0",
    ),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZE, **DECODER), 4, "model.layers.0"),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZE, **DECODER), 4, "model.layers.0"),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZE, **DECODER, head_dim=8), 4, "model.layers.0"),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**SIZE, **DECODER), 4, "model.layers.0"),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**SIZE, **DECODER, head_dim=8), 4, "model.layers.0"),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**SIZE, **DECODER, num_local_experts=4),
        4,
        "model.layers.0",
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=3,
            num_decoder_layers=4,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        7,
        "encoder.block.0",
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=3,
            decoder_layers=4,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
        ),
        7,
        "model.encoder.layers.0",
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
        ),
        4,
        None,
    ),
    "resnet": (
        tf.ResNetForImageClassification,
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], layer_type="basic"),
        4,
        "resnet.encoder.stages.0",
    ),
    # Its convolutions are checkpointed layers as well, and no transformer blocks.
    "wav2vec2": (
        tf.Wav2Vec2ForSequenceClassification,
        tf.Wav2Vec2Config(
            **{**SIZE, "hidden_size": 32, "intermediate_size": 128},
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        4,
        "wav2vec2.encoder.layers.0",
    ),
}


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
    with pytest.raises(ValueError, match=r"3 block\(s\), 1 of them trainable"):
        find_candidates(model, find_blocks(model), None)


def test_frozen_blocks_and_weights_are_left_out():
    model = bert(blocks=4)
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.encoder.layer[2].attention.requires_grad_(False)
    candidates = find_candidates(model, find_blocks(model), None)
    assert [candidate.name[-1] for candidate in candidates] == ["0", "2", "3"]
    assert [candidate.first_block for candidate in candidates] == [0, 2, 3]
    assert all(parameter.requires_grad for candidate in candidates for parameter in candidate.parameters)


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
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("lora_" in names[id(p)] for candidate in candidates for p in candidate.parameters)
    assert all(torch.is_floating_point(p) for candidate in candidates for p in candidate.parameters)
