"""Tiny random models of every architecture whose blocks are found, and batches for them."""

import torch
import transformers as tf

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


TOKENS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def batch_for(name):
    if name in ("vit", "resnet"):
        size = 16 if name == "vit" else 64
        return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])}
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    is_classifier = name in ("bert", "roberta", "distilbert", "deberta-v2", "electra", "modernbert")
    return {"input_ids": TOKENS, "labels": torch.tensor([0, 1]) if is_classifier else TOKENS}


def model_of(name, dropout=0.1):
    model_class, config, *_ = ARCHITECTURES[name]
    for field in vars(config):
        if "dropout" in field and isinstance(getattr(config, field), float):
            setattr(config, field, dropout)
    tf.set_seed(0)
    return model_class(config).train()
