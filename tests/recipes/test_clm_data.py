"""What the language-model recipe makes of text, and what it refuses."""

import pytest
from datasets import Dataset, DatasetDict
from tiny_clm import save_model, write_questions, write_text
from tiny_glue import write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer

from hf_lsam_recipes.support import tables
from hf_lsam_recipes.support.text import clm_data
from hf_lsam_recipes.support.text.clm_arguments import DataArguments
from hf_lsam_recipes.support.text.clm_data import Rows, find_block_size, load_rows, make_examples, prompt_and_response

NO = clm_data.NO_LABEL
PAIRS = {"train_file": "unused", "prompt_column": "question", "response_column": "answer"}
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} [SEP] {% endfor %}" + (
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokenizer(model):
    """Whole words: `film` is 4, `good` 5, `bad` 6, `the` 7; the end of a text is 3."""
    return AutoTokenizer.from_pretrained(model)


def examples(tokenizer, rows, block_size=8, **settings):
    return make_examples(DataArguments(**settings), tokenizer, "train", Rows("data", rows), block_size)


# Labels


def test_the_loss_is_on_the_response_and_its_end(tokenizer):
    made = examples(tokenizer, [("film good", "bad the"), ("", "film")], packing=False, **PAIRS)
    assert made.dataset.to_dict() == {
        "input_ids": [[4, 5, 6, 7, 3], [4, 3]],
        # No token comes before the first one, so it is not learned.
        "labels": [[NO, NO, 6, 7, 3], [NO, 3]],
    }
    assert (made.truncated, made.dropped) == (0, 0)


def test_running_text_is_learned_whole(tokenizer):
    made = examples(tokenizer, [("film good",), ("bad",)], packing=False, train_file="unused")
    assert made.dataset.to_dict() == {"input_ids": [[4, 5, 3], [6, 3]], "labels": [[NO, 5, 3], [NO, 3]]}


def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer):
    tokenizer.bos_token = "[CLS]"
    assert examples(tokenizer, [("film", "bad")], packing=False, **PAIRS).dataset["input_ids"][:] == [[4, 6, 3]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    made = examples(tokenizer, [("film", "bad")], packing=False, **PAIRS)
    assert made.dataset.to_dict() == {"input_ids": [[2, 4, 6, 3]], "labels": [[NO, NO, 6, 3]]}


# Length


def test_what_is_cut_off_and_what_is_left_out_is_counted(tokenizer):
    rows = [("film", "good bad the"), ("film film film", "good bad"), ("film film film film", "good"), ("film", "bad")]
    made = examples(tokenizer, rows, block_size=4, packing=False, **PAIRS)
    assert made.dataset.to_dict() == {
        "input_ids": [[4, 5, 6, 7], [4, 4, 4, 5], [4, 6, 3]],
        "labels": [[NO, 5, 6, 7], [NO, NO, NO, 5], [NO, 6, 3]],
    }
    assert (made.truncated, made.dropped) == (3, 1)


def test_packing_joins_all_texts_and_loses_none(tokenizer):
    made = examples(tokenizer, [("film good bad",), ("the",), ("film film",)], block_size=4, train_file="unused")
    assert made.dataset.to_dict() == {
        "input_ids": [[4, 5, 6, 3], [7, 3, 4, 4]],
        "labels": [[NO, 5, 6, 3], [NO, 3, 4, 4]],
    }
    # What remains is the end of the last text: a single token, that nothing comes before.
    assert (made.truncated, made.dropped) == (0, 1)


def test_packing_keeps_prompts_masked_and_leaves_out_blocks_of_nothing_else(tokenizer):
    made = examples(tokenizer, [("film " * 7, "good"), ("bad", "the")], block_size=4, **PAIRS)
    # 4 4 4 4 | 4 4 4 5 | 3 6 7 3
    assert made.dataset.to_dict() == {
        "input_ids": [[4, 4, 4, 5], [3, 6, 7, 3]],
        "labels": [[NO, NO, NO, 5], [NO, NO, 7, 3]],
    }
    assert made.dropped == 1


def test_limits_are_on_examples(tokenizer):
    text = [("film " * 20,)]
    assert len(examples(tokenizer, text, max_train_samples=2, train_file="unused").dataset) == 2
    assert len(examples(tokenizer, text, max_train_samples=99, train_file="unused").dataset) == 3


def test_block_size_fits_the_model(model, tokenizer):
    config = AutoConfig.from_pretrained(model)
    assert find_block_size(DataArguments(train_file="a.txt"), config, tokenizer) == 64
    assert find_block_size(DataArguments(train_file="a.txt", block_size=64), config, tokenizer) == 64
    with pytest.raises(ValueError, match="block_size=65 is larger than the context of the model, 64 tokens"):
        find_block_size(DataArguments(train_file="a.txt", block_size=65), config, tokenizer)
    config.max_position_embeddings = 9999
    assert find_block_size(DataArguments(train_file="a.txt"), config, tokenizer) == 1024


# Templates


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{prompt}\n{response}", ("p {response}\n", "r")),
        # A space goes to the word behind it, as tokenizers have it.
        ("Q: {prompt} A:  {response}.", ("Q: p {response} A:", "  r.")),
    ],
)
def test_template(template, expected):
    assert prompt_and_response(DataArguments(template=template, **PAIRS), None, "p {response}", "r") == expected


def test_chat_template_of_the_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT
    args = DataArguments(use_chat_template=True, packing=False, **PAIRS)
    assert prompt_and_response(args, tokenizer, "film", "bad") == (
        "user : film [SEP] assistant : ",
        "bad [SEP] ",
    )
    made = make_examples(args, tokenizer, "train", Rows("data", [("film", "bad")]), 16)
    assert made.dataset["labels"][:] == [[NO] * 6 + [6, 3]]
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length }} {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="formats a prompt differently with and without its"):
        prompt_and_response(args, tokenizer, "film", "bad")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Set template"):
        prompt_and_response(args, tokenizer, "film", "bad")


# Sources


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"text": "film good"}, {"text": 'a "b"'}, {"text": ""}, {"text": "1"}]
    file = str(write_rows(tmp_path / f"train{suffix}", rows))
    read = load_rows(DataArguments(train_file=file, validation_fraction=0), ["train"])
    assert read["train"].rows == [("film good",), ('a "b"',), ("1",)]


def test_rows_are_held_out_always_the_same(tmp_path):
    args = DataArguments(**PAIRS | {"train_file": write_questions(tmp_path / "a.jsonl", 40)}, validation_fraction=0.25)
    both = load_rows(args, ["train", "validation"])
    assert (len(both["train"].rows), len(both["validation"].rows)) == (30, 10)
    assert not set(both["train"].rows) & set(both["validation"].rows)
    assert load_rows(args, ["train"])["train"] == both["train"]
    assert load_rows(args, ["validation"])["validation"] == both["validation"]


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    file = tmp_path / "a.txt"
    args = DataArguments(train_file=write_text(file), validation_fraction=0.2)
    read = load_rows(args, ["train", "validation"])
    [(train,)], [(validation,)] = read["train"].rows, read["validation"].rows
    assert train + validation == file.read_text()
    assert train.endswith("\n")
    assert 0.1 < len(validation) / len(train + validation) <= 0.2


def test_hub_gives_what_files_give(tmp_path, monkeypatch):
    file = write_questions(tmp_path / "a.parquet")

    def hub(name, config):
        assert (name, config) == ("openai/gsm8k", "main")
        return DatasetDict({"train": Dataset.from_parquet(file), "test": Dataset.from_parquet(file).select([3, 1])})

    monkeypatch.setattr(tables, "load_dataset", hub)
    columns = {"prompt_column": "question", "response_column": "answer"}
    source = {"dataset_name": "openai/gsm8k", "dataset_config_name": "main", **columns}
    read = load_rows(DataArguments(validation_split="test", **source), ["train", "validation"])
    expected = load_rows(DataArguments(train_file=file, validation_file=file, **columns), ["train"])["train"].rows
    assert read["train"].rows == expected
    assert read["validation"].rows == [expected[3], expected[1]]
    with pytest.raises(ValueError, match="gsm8k has no split 'dev', but train, test: set validation_split"):
        load_rows(DataArguments(validation_split="dev", **source), ["validation"])


def test_a_data_set_that_is_a_script_is_one_error(monkeypatch):
    def script(*args):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(tables, "load_dataset", script)
    with pytest.raises(ValueError, match="dataset_name=a/b could not be loaded .*scripts are no longer.*train_file"):
        load_rows(DataArguments(dataset_name="a/b"), ["train"])


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "No data: set dataset_name"),
        ({"train_file": "a", "dataset_name": "b"}, "dataset_name and train_file both say"),
        ({"train_file": "a", "train_split": "b"}, "train_split is for data on the Hub, and train_file is a file"),
        ({"train_file": "a", "prompt_column": "b"}, "prompt_column and response_column go together"),
        (PAIRS | {"text_column": "b"}, "text_column is for plain text"),
        ({"train_file": "a", "template": "{prompt}{response}"}, "template is for prompts and responses"),
        (PAIRS | {"template": "{response}{prompt}"}, "template must contain {prompt} once and {response} once after"),
        (PAIRS | {"template": "{prompt}"}, "template must contain"),
        (PAIRS | {"template": "{prompt}{response}", "use_chat_template": True}, "leave template out"),
        ({"train_file": "a", "validation_fraction": 1}, "validation_fraction must be at least 0 and less than 1"),
        ({"train_file": "a", "block_size": 1}, "block_size must be at least 2, but is 1"),
        ({"train_file": "a", "max_eval_samples": 0}, "max_eval_samples must be at least 1"),
    ],
)
def test_settings_at_odds(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


@pytest.mark.parametrize(
    "name, content, settings, message",
    [
        ("none.txt", None, {}, "none.txt is not a file"),
        ("a.md", b"film", {}, "a.md must end in .txt, .tsv, .csv, .jsonl, .parquet"),
        ("a.txt", b" \n", {}, "a.txt holds no text"),
        ("a.txt", b"\xff", {}, "a.txt is not UTF-8"),
        ("a.txt", b"film", {"packing": False}, "a.txt is plain text without columns or rows"),
        ("a.txt", b"", {}, "a.txt holds no text"),
        ("a.csv", b"text\n", {}, "a.csv holds no example"),
        ("a.csv", b"body\nfilm\n", {}, "a.csv must have one column 'text', but has body. Set text_column, or"),
        ("a.jsonl", b'{"text": 1}\n', {}, "a.jsonl, row 1: column 'text' must hold text, but holds 1"),
        ("a.jsonl", b"", {}, "a.jsonl cannot be read as jsonl"),
        ("a.txt", b"f", {"validation_fraction": 0.5}, "a.txt is too short to hold out validation_fraction=0.5"),
        ("a.csv", b"question,answer\nfilm,bad\n", PAIRS, "a.csv is too short to hold out"),
        ("a.txt", b"film", {"validation_fraction": 0}, "No validation data: set validation_file"),
    ],
)
def test_bad_files(tmp_path, name, content, settings, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(DataArguments(**settings | {"train_file": str(tmp_path / name)}), ["train", "validation"])
    assert len(str(error.value).splitlines()) == 1


def test_nothing_to_learn(tokenizer):
    with pytest.raises(ValueError, match="data: no example has a token to learn, since the prompts fill block_size=4"):
        examples(tokenizer, [("film film film film", "good")], block_size=4, packing=False, **PAIRS)
