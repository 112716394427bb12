"""The model card: what it says, and that no setting can break out of its place."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cards import body_of, code_of, outline, tables_in, tables_of
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from tiny_clm import questions_argv, save_model, write_questions
from tiny_glue import rte
from tiny_images import QUICK, SMALL, save_vit, write_folder
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_lsam import LSAMConfig
from hf_lsam_recipes import run_clm, run_glue, run_image_classification
from hf_lsam_recipes.support import model_card
from hf_lsam_recipes.support.metric_names import find_score
from hf_lsam_recipes.support.model_card import Subject
from hf_lsam_recipes.support.text.glue_tasks import DataArguments

pytest_plugins = ["glue_fixtures"]


def test_model_card(bert, glue, tmp_path):
    hostile = "```\n# <script>|{x}`*|.*"
    argv = [*rte(bert, glue, tmp_path), "--do_train", "--do_eval", "--perturb_start", "0.9", "--rho", "0.25"]
    metrics = run_glue.main([*argv, "--block_pattern", hostile + r"|bert\.encoder\.layer\.\d"])
    card = (tmp_path / "README.md").read_text()
    assert "2503.14205" in card and "Sunwoo Lee" in card and "fine-tuned with layer-wise SAM" in card
    training, lsam, results = tables_of(card)
    expected = LSAMConfig(rho=0.25, perturb_start=0.9, block_pattern=hostile + r"|bert\.encoder\.layer\.\d")
    # A cell is one line.
    assert lsam == dataclasses.asdict(expected) | {"block_pattern": expected.block_pattern.replace("\n", " ")}
    assert (training["data"], training["seed"], training["model"]) == ("GLUE rte (local files)", 42, Path(bert).name)
    assert results["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-5)
    assert hostile not in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert not {"base_model", "datasets", "license"} & header.keys()


def test_scores_are_a_model_index_as_huggingface_hub_reads_it(bert, glue, tmp_path):
    options = ["--do_train", "--do_eval", "--do_predict", "--validation_fraction", "0.3"]
    metrics = run_glue.main([*rte(bert, glue, tmp_path), *options])
    data = ModelCard.load(tmp_path / "README.md").data
    scores = ["accuracy", "brier", "ece", "nll"]
    assert data.model_name == tmp_path.name and data.metrics == scores
    assert {(result.metric_name, result.metric_type) for result in data.eval_results} == {
        (f"{split}_{score}", score) for split in ("eval", "predict") for score in (*scores, "loss")
    }
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type) == ("text-classification", "local")
        assert result.dataset_name == "GLUE rte (local files), validation_fraction=0.3"
        assert result.metric_value == pytest.approx(metrics[result.metric_name], rel=1e-5)
    # What the header holds is what is made of the results again.
    name, results = model_index_to_eval_results(metadata_load(tmp_path / "README.md")["model-index"])
    assert (name, results) == (data.model_name, data.eval_results)
    assert eval_results_to_model_index(name, results) == metadata_load(tmp_path / "README.md")["model-index"]


def test_a_card_without_scores_has_no_model_index(tmp_path):
    write(
        tmp_path, "someone/model", {"train_loss": 0.5, "eval_loss": math.nan, "eval_runtime": 1.0, "eval_samples": 3}
    )
    header = metadata_load(tmp_path / "README.md")
    assert not {"model-index", "metrics"} & header.keys()
    assert tables_in(tmp_path)[2]["train_loss"] == 0.5


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("eval_accuracy", "accuracy"),
        ("eval_mm_f1", "f1"),
        ("predict_matthews_correlation", "matthews_correlation"),
        ("test_loss", "loss"),
        ("eval_exact_match", "exact_match"),
        ("train_loss", None),
        ("eval_samples_per_second", None),
        ("eval_generation_samples", None),
        ("eval_model_preparation_time", None),
        ("epoch", None),
    ],
)
def test_scores_are_told_from_amounts_and_speeds(name, score):
    assert find_score(name) == score


def test_model_card_of_plain_training(bert, glue, tmp_path):
    run_glue.main([*rte(bert, glue, tmp_path), "--do_train", "--block_selection", "none"])
    assert "fine-tuned without perturbation (layer-wise SAM is off)" in (tmp_path / "README.md").read_text()


def write(folder: Path, model_name: str, metrics: dict, subject: Subject | None = None, **changes) -> None:
    """The card of a run that trained nothing."""
    args = TrainingArguments(str(folder), use_cpu=True, **changes)
    model = BertForSequenceClassification(BertConfig(hidden_size=2, num_hidden_layers=1, num_attention_heads=1))
    trainer = SimpleNamespace(args=args, lsam_config=LSAMConfig(), hub_model_id="me/mine", model=model)
    subject = subject or run_glue.describe(DataArguments(task_name="stsb"))
    model_card.write_model_card(trainer, model_name, subject, metrics)


def test_model_card_is_pushed_with_the_model(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        model_card.ModelCard, "push_to_hub", lambda card, repo, token: pushed.append((repo, card.content))
    )
    write(tmp_path, "google-bert/bert-base-cased", {"a": math.nan}, push_to_hub=True)
    content = (tmp_path / "README.md").read_text()
    assert pushed == [("me/mine", content)]
    header = yaml.safe_load(content.split("---\n")[1])
    assert (header["base_model"], header["datasets"]) == ("google-bert/bert-base-cased", "nyu-mll/glue")
    assert "model='me/mine'" in code_of(content)


# The licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://a.b"},
        ),
        ("---\ntags: [a]\n---\n", {}),
        ("# No header\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- no\n- mapping\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_that_the_card_of_the_base_model_names(tmp_path, text, licence):
    base, folder = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    folder.mkdir()
    if text is not None:
        (base / "README.md").write_text(text)
    write(folder, str(base), {})
    header = metadata_load(folder / "README.md")
    assert {name: value for name, value in header.items() if name.startswith("license")} == licence


def test_the_card_of_a_model_on_the_hub_is_looked_up_there(tmp_path, monkeypatch):
    (tmp_path / "card").write_text("---\nlicense: apache-2.0\n---\n")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.repocard.hf_hub_download", lambda name, *_, **__: asked.append(name) or tmp_path / "card"
    )
    write(tmp_path, "someone/model", {})
    assert asked == ["someone/model"] and metadata_load(tmp_path / "README.md")["license"] == "apache-2.0"


def test_a_model_from_scratch_has_no_licence(tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "find_license", None)
    subject = Subject("run.py", "image classification", "image-classification", "a", None, from_scratch=True)
    write(tmp_path, "ResNet-20", {}, subject)
    assert "license" not in metadata_load(tmp_path / "README.md")


# Nothing in a card can break out of its place

HOSTILE = "x\n---\nlicense: mit\n---\n# Title `y` | ![](http://example.com/x.png) <img src=x>\n```\n{z}"
HOSTILE += " **b** ~~s~~ _e_ __f__ [a](b)"


def test_fields_of_a_model_card_stay_in_their_place(tmp_path):
    plain, hostile = (card(tmp_path, name, text) for name, text in (("plain", "x"), ("hostile", HOSTILE)))
    header, body = hostile.removeprefix("---\n").split("\n---\n", 1)
    names = yaml.safe_load(header)
    assert names["base_model"] == names["datasets"] == HOSTILE
    assert names.keys() == yaml.safe_load(plain.removeprefix("---\n").split("\n---\n", 1)[0]).keys()
    assert outline(body) == outline(body_of(plain))
    training, lsam, metrics = tables_of(hostile)
    line = " ".join(HOSTILE.split())
    assert training["data"] == training["lora_target_modules"] == line
    assert lsam["block_pattern"] == " ".join(re.escape(HOSTILE).split())
    assert metrics == {line: None} | {"a": 1.0, "eval_accuracy": 0.5}
    assert [result.dataset_name for result in ModelCard(hostile).data.eval_results] == [HOSTILE]


def card(folder: Path, name: str, text: str) -> str:
    """The card of a model, whose every free field is `text`."""
    args = TrainingArguments(str(folder / name), use_cpu=True)
    Path(args.output_dir).mkdir()
    config = LSAMConfig(block_pattern=re.escape(text))
    subject = Subject("run.py", "text classification", "text-classification", text, text)
    model = SimpleNamespace(config=SimpleNamespace(num_labels=2))
    trainer = SimpleNamespace(args=args, lsam_config=config, model=model)
    metrics = {text: None, "a": 1.0, "eval_accuracy": 0.5}
    model_card.write_model_card(trainer, text, subject, metrics, {"lora_target_modules": text})
    return (Path(args.output_dir) / "README.md").read_text()


# What is written under "Usage" runs


def run_usage(folder: Path, capsys, *replaced: tuple[str, str]) -> str:
    """What the code of a card prints, with the paths that its reader fills in."""
    code = code_of((folder / "README.md").read_text())
    for old, new in [(f"'path/to/{folder.name}'", f"{str(folder)!r}"), *replaced]:
        assert old in code
        code = code.replace(old, new)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


@pytest.mark.parametrize("task", ["rte", "sst2", "stsb"])
def test_usage_of_a_text_classifier(task, bert, glue, tmp_path, capsys):
    argv = rte(bert, glue, tmp_path)
    argv[argv.index("rte")] = task
    run_glue.main([*argv, "--do_train"])
    assert ("text_pair" in code_of((tmp_path / "README.md").read_text())) == (task != "sst2")
    assert "'score': " in run_usage(tmp_path, capsys)


@pytest.mark.parametrize("task", ["rte", "mnli", "sst2"])
def test_usage_of_an_adapter(task, bert, glue, tmp_path, capsys):
    argv = rte(bert, glue, tmp_path / "out")
    argv[argv.index("rte")] = task
    run_glue.main([*argv, "--do_train", "--lora_r", "2"])
    text = run_usage(tmp_path / "out", capsys, (f"'path/to/{Path(bert).name}'", repr(bert)))
    assert "logits=tensor" in text


@pytest.mark.parametrize("options", [[], ["--lora_r", "2"]])
def test_usage_of_a_language_model(options, tmp_path, capsys):
    model, questions = save_model(tmp_path / "llama"), write_questions(tmp_path / "q.jsonl")
    run_clm.main(questions_argv(model, tmp_path / "out", questions, *options))
    base = [("'path/to/llama'", repr(model))] if options else []
    assert run_usage(tmp_path / "out", capsys, *base).strip()


@pytest.mark.parametrize("options", [["--depth", "8"], ["--architecture", "wide_resnet", "--depth", "10"], []])
def test_usage_of_an_image_classifier(options, tmp_path, capsys, monkeypatch):
    """One of the recipes' own is known to transformers by an import alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = write_folder(tmp_path / "images")
    kind = [*SMALL, *options, "--widen_factor", "1"] if "wide_resnet" in options else [*SMALL, *options]
    kind = kind if options else ["--model_name_or_path", save_vit(tmp_path / "vit")]
    argv = [*kind, *QUICK, "--train_images", images, "--do_train", "--max_steps", "1"]
    run_image_classification.main([*argv, "--output_dir", str(tmp_path / "out")])
    code = code_of((tmp_path / "out" / "README.md").read_text())
    assert code.startswith("import hf_lsam_recipes.support.images.resnets  # ") == bool(options)
    assert "'label': 'red'" in run_usage(tmp_path / "out", capsys, ('"image.png"', repr(f"{images}/red/0.png")))


def test_a_local_data_set_is_not_named_in_the_card(tmp_path):
    for describe in (
        lambda name: run_clm.describe(run_clm.DataArguments(dataset_name=name)),
        lambda name: run_image_classification.describe(
            run_image_classification.ModelArguments("a/b"), run_image_classification.DataArguments(dataset_name=name)
        ),
    ):
        assert describe("someone/data").dataset == "someone/data"
        subject = describe(str(tmp_path))
        assert subject.dataset is None and str(tmp_path) not in subject.data
