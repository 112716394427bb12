"""The GLUE recipe on texts that are longer than its model can read."""

import json

import pytest
from tiny_glue import make_rows, rte, save_tokenizer, write_rows
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig

from hf_lsam_recipes import run_glue


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_texts_are_no_longer_than_the_model_can_read(tmp_path, kind):
    """Where the tokenizer does not know it; RoBERTa counts positions from behind that of padding."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = kind(vocab_size=16, max_position_embeddings=12, pad_token_id=0, **sizes)
    model = tmp_path / "model"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    save_tokenizer(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**30}))
    long = [row | {"sentence1": "film " * 40} for row in make_rows("rte", 8)]
    for name in ("train", "dev"):
        write_rows(tmp_path / "rte" / f"{name}.tsv", long)
    run = run_glue.prepare(
        [*rte(str(model), str(tmp_path), tmp_path / "out"), "--do_train", "--max_seq_length", "512"]
    )
    assert {len(row["input_ids"]) for row in run.datasets["train"]} == {12 if kind is BertConfig else 11}
    run.trainer.train()
