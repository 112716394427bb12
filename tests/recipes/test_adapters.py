"""The GLUE recipe with LoRA: encoders and decoders, from its YAML to an adapter that is loaded again."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cards import tables_of
from peft import PeftModel
from test_run_glue import RECIPES, read_predictions
from tiny_glue import QUICK, files_in, rte, save_bert, save_decoder, save_tokenizer, write_rows
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_lsam_recipes import run_glue
from hf_lsam_recipes.support import adapters
from hf_lsam_recipes.support.adapters import AdapterArguments, add_adapter

pytest_plugins = ["glue_fixtures"]

LORA = ["--lora_r", "2", "--lora_alpha", "4", "--learning_rate", "0.05"]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict[str, str]:
    return {kind: save_decoder(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, bert, glue) -> tuple[Path, dict]:
    """What a run on RTE with LoRA and a checkpoint at each of two steps leaves, and its metrics. Read-only."""
    folder = tmp_path_factory.mktemp("lora") / "out"
    options = ["--lora_dropout", "0.1", "--do_train", "--do_eval", "--do_predict", "--save_steps", "1"]
    return folder, run_glue.main([*rte(bert, glue, folder), *LORA, *options])


# From the YAML to the submission


@pytest.mark.parametrize(
    "yaml, kind", [("rte_lora", "bert"), ("sst2_lora_decoder", "llama"), ("sst2_lora_decoder", "qwen2")]
)
def test_yaml_runs_from_training_to_submission(yaml, kind, bert, decoders, glue, tmp_path):
    model = {"bert": bert, **decoders}[kind]
    settings = ["--model_name_or_path", model, "--data_dir", glue, "--output_dir", str(tmp_path), *QUICK]
    settings += ["--perturb_start", "0", "--logging_steps", "1", "--do_predict"]
    metrics = run_glue.main([str(RECIPES / "glue" / f"{yaml}.yaml"), *settings])
    assert math.isfinite(metrics["train_loss"]) and "eval_accuracy" in metrics
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, model)
    attention = {"query", "value"} if kind == "bert" else {"q_proj", "v_proj"}
    assert (set(config["target_modules"]) == attention) == (yaml == "rte_lora")
    assert not (tmp_path / "model.safetensors").exists()
    task = yaml.split("_")[0]
    assert len(read_predictions(tmp_path / {"rte": "RTE.tsv", "sst2": "SST-2.tsv"}[task])) == 8
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history[0]["lsam/active"] == 1


def test_only_the_adapter_and_the_head_are_trained(bert, glue, tmp_path):
    run = run_glue.prepare([*rte(bert, glue, tmp_path), *LORA, "--do_train", "--use_dora"])
    model = run.trainer.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {"lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"}
    assert {next(part for part in parts if f".{part}." in name) for name in trained} == parts
    base = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    run_glue.execute(run)
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)


@pytest.mark.parametrize("kind", ["distilbert", "bert without a pooler"])
def test_what_the_checkpoint_did_not_hold_is_trained_whole(kind, glue, tmp_path):
    """Random weights that stay as they are would only be in the way: PEFT itself knows `classifier` and `score`."""
    folder = tmp_path / "model"
    if kind == "distilbert":
        config = DistilBertConfig(vocab_size=16, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
        DistilBertForSequenceClassification(config).distilbert.save_pretrained(folder)
        save_tokenizer(folder)
        expected = {"pre_classifier", "classifier"}
    else:
        config = AutoConfig.from_pretrained(save_bert(folder))
        (folder / "model.safetensors").unlink()
        BertForMaskedLM(config).save_pretrained(folder)
        expected = {"bert.pooler.dense", "classifier"}
    argv = [*rte(str(folder), glue, tmp_path / "out"), *LORA, "--do_train", "--lora_target_modules", "all-linear"]
    model = run_glue.prepare(argv).trainer.model
    whole = {n.split(".modules_to_save")[0] for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert {name.removeprefix("base_model.model.") for name in whole} == expected


# Padding


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_decoder_reads_the_last_token_before_the_padding(kind, decoders, glue, tmp_path):
    """Rows of a padded batch get the logits that they get alone, in the run and from the adapter's folder."""
    out = tmp_path / "out"
    run = run_glue.prepare([*rte(decoders[kind], glue, out), *LORA, "--do_train"])
    run_glue.execute(run)
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = {"llama": ("[SEP]", 3), "qwen2": ("[PAD]", 0)}[kind]
    assert (tokenizer.pad_token, run.trainer.model.config.pad_token_id) == expected
    assert tokenizer.padding_side == "right"
    again = run_glue.prepare([*rte(str(out), glue, tmp_path / "again"), "--do_eval"])
    texts = ["film", "good bad the a is dull", "bright film is dull"]
    for model in (run.trainer.model, again.trainer.model):
        assert model.config.pad_token_id == expected[1]
        model.eval()
        with torch.no_grad():
            together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
            alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        assert torch.allclose(together, alone, atol=1e-5)
        assert (alone[0] - alone[1]).abs().max() > 1e-3


# The adapter's folder


def test_an_adapter_is_evaluated_and_predicts_by_its_folder(lora_run, bert, glue, tmp_path):
    folder, metrics = lora_run
    argv = [*rte(str(folder), glue, tmp_path), "--do_eval", "--do_predict"]
    again = run_glue.main(argv)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == metrics["eval_accuracy"]
    assert (tmp_path / "RTE.tsv").read_text() == (folder / "RTE.tsv").read_text()
    # It was the adapter that was evaluated, and not its base.
    base = run_glue.main([*rte(bert, glue, tmp_path / "base"), "--do_eval"])
    assert abs(base["eval_loss"] - metrics["eval_loss"]) > 1e-4


def test_an_adapter_is_loaded_with_its_labels(lora_run):
    folder, _ = lora_run
    config = AutoConfig.from_pretrained(folder, subfolder=adapters.MODEL_CONFIG)
    assert config.id2label == {0: "entailment", 1: "not_entailment"}
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    base = AutoModelForSequenceClassification.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    peft_model = PeftModel.from_pretrained(base, folder)
    batch = {"input_ids": torch.arange(4, 9)[None]}
    logits = peft_model.eval()(**batch).logits
    assert torch.allclose(model.eval()(**batch).logits, logits, atol=1e-6)
    assert torch.allclose(peft_model.merge_and_unload()(**batch).logits, logits, atol=1e-5)


def test_an_adapter_knows_classes_of_ones_own(bert, tmp_path):
    rows = [{"text": f"the film {number}", "label": label} for number, label in enumerate("5135" * 4)]
    train, test = write_rows(tmp_path / "train.csv", rows), write_rows(tmp_path / "test.csv", rows)
    out = tmp_path / "out"
    options = ["--model_name_or_path", bert, "--output_dir", str(out), *QUICK, *LORA, "--do_train", "--do_predict"]
    run_glue.main([*options, "--train_file", str(train), "--test_file", str(test)])
    again = ["--model_name_or_path", str(out), "--output_dir", str(tmp_path / "again"), *QUICK, "--do_predict"]
    run_glue.main([*again, "--test_file", str(test)])
    predictions = read_predictions(out / "predictions.tsv")
    assert set(predictions) <= {"1", "3", "5"}
    assert read_predictions(tmp_path / "again" / "predictions.tsv") == predictions


def test_an_adapter_made_elsewhere_is_evaluated(lora_run, glue, tmp_path):
    folder, metrics = lora_run
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / adapters.MODEL_CONFIG)
    again = run_glue.main([*rte(str(tmp_path / "elsewhere"), glue, tmp_path / "out"), "--do_eval"])
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_an_interrupted_run_resumes_to_the_same_adapter(lora_run, bert, glue, tmp_path):
    folder, _ = lora_run
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    argv = [*rte(bert, glue, tmp_path), *LORA, "--lora_dropout", "0.1", "--do_train", "--save_steps", "1"]
    run_glue.main([*argv, "--resume_from_checkpoint", "true"])
    assert files_in(tmp_path)["adapter_model.safetensors"] == files_in(folder)["adapter_model.safetensors"]


def test_model_card_of_an_adapter(lora_run, bert):
    card = (lora_run[0] / "README.md").read_text()
    assert "library_name: peft" in card and "A text classification adapter, fine-tuned with layer-wise SAM" in card
    assert tables_of(card)[0]["lora_r"] == 2


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--lora_r", "0"], "lora_r must be at least 1, or null for no adapter, but is 0"),
        ([*LORA, "--lora_alpha", "0"], "lora_alpha must be more than 0"),
        ([*LORA, "--lora_dropout", "1"], "lora_dropout must be at least 0 and less than 1"),
        (["--lora_alpha", "16"], "lora_alpha is a setting of LoRA, which is off: set lora_r"),
        ([*LORA, "--lora_target_modules", "query", "nothing"], "it has no nothing.*all-linear.* key, query, value"),
        ([*LORA, "--lora_target_modules", "LayerNorm"], "LayerNorm.* is not supported.* key, query, value"),
        ([*LORA, "--block_pattern", r"bert\.encoder\.layer\.\d"], r"matches no module.*'base_model\\\\.model"),
        ([*LORA, "--lora_target_modules", "pooler.dense"], "None of the 3 blocks"),
    ],
)
def test_bad_settings_raise_before_training(settings, message, bert, glue, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run_glue.main([*rte(bert, glue, tmp_path), "--do_train", *settings])
    assert len(str(error.value).splitlines()) == 1
    assert not files_in(tmp_path)


def test_a_model_type_that_peft_does_not_know_needs_target_modules():
    config = DistilBertConfig(vocab_size=16, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
    model = DistilBertForSequenceClassification(config)
    with pytest.raises(ValueError, match="lora_target_modules=None: .*Set lora_target_modules to all-linear.* q_lin"):
        add_adapter(model, AdapterArguments(lora_r=2), set())
    assert isinstance(add_adapter(model, AdapterArguments(lora_r=2, lora_target_modules=["q_lin"]), set()), PeftModel)


def test_an_adapter_with_another_head_is_not_evaluated(lora_run, glue, tmp_path):
    """Its head must not be left out for its size; only the labels of the task tell, where it was made elsewhere."""
    folder = tmp_path / "adapter"
    shutil.copytree(lora_run[0], folder)
    options = ["--output_dir", str(tmp_path / "out"), *QUICK, "--model_name_or_path", str(folder), "--do_eval"]
    mnli = ["--task_name", "mnli", "--data_dir", glue]
    with pytest.raises(ValueError, match="The model predicts entailment, not_entailment, but the data of mnli needs"):
        run_glue.main([*options, *mnli])
    shutil.rmtree(folder / adapters.MODEL_CONFIG)
    base = save_bert(tmp_path / "base", num_labels=3)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="does not fit its model: .*size mismatch"):
        run_glue.main([*options, *mnli])


def test_an_adapter_is_not_trained_on(lora_run, glue, tmp_path):
    argv = [*rte(str(lora_run[0]), glue, tmp_path), "--do_train"]
    with pytest.raises(ValueError, match="is an adapter.* To train, name its base model"):
        run_glue.main(argv)
    assert not files_in(tmp_path)


def test_a_run_does_not_write_over_an_adapter(lora_run, bert, glue):
    with pytest.raises(ValueError, match="already holds README.md, adapter_config.json, adapter_model.safetensors"):
        run_glue.main([*rte(bert, glue, lora_run[0]), *LORA, "--do_train"])


def test_target_modules_mean_the_same_in_a_yaml_and_on_the_command_line(bert, glue, tmp_path):
    forms = {"lora_target_modules: [query, key]": ["query", "key"], "lora_target_modules: all-linear": ["all-linear"]}
    forms["lora_target_modules: null"] = None
    path = tmp_path / "settings.yaml"
    for text, expected in forms.items():
        path.write_text(f"lora_r: 2\n{text}\n")
        run = run_glue.prepare([str(path), *rte(bert, glue, tmp_path / "out"), "--do_train"])
        assert run.adapter_args.lora_target_modules == expected
