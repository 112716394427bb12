"""A tiny causal language model and tiny text for the tests of the recipe."""

import random
from pathlib import Path

from tiny_glue import QUICK, WORDS, save_decoder, write_rows

FILM = [word for word in WORDS if word.isalpha()]


def save_model(folder: Path, **settings) -> str:
    """A random Llama of 2 blocks that reads 64 tokens, with a tokenizer of whole words that ends texts by `[SEP]`."""
    return save_decoder(folder, max_position_embeddings=64, **settings)


def write_questions(path: Path, count: int = 12, seed: int = 0) -> str:
    """Questions of different lengths, with answers that end as those of GSM8K do."""
    rng = random.Random(seed)
    return str(
        write_rows(
            path,
            [
                {
                    "question": " ".join(rng.choices(FILM, k=rng.randint(1, 9))),
                    "answer": " ".join(rng.choices(FILM, k=rng.randint(1, 4))) + f"\n#### {rng.randint(1, 9)},000",
                }
                for _ in range(count)
            ],
        )
    )


def write_text(path: Path, lines: int = 60, seed: int = 0) -> str:
    """Running text of three words a line."""
    rng = random.Random(seed)
    path.write_text("".join(" ".join(rng.choices(FILM, k=3)) + "\n" for _ in range(lines)))
    return str(path)


def argv(model: str, output: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", model, "--output_dir", str(output), *QUICK, "--report_to", "none", *more]


def questions_argv(model: str, output: Path, train: str, *more: str) -> list[str]:
    """Training and evaluation on questions, one a row."""
    columns = ["--prompt_column", "question", "--response_column", "answer", "--packing", "false"]
    files = ["--train_file", train, "--validation_file", train]
    return argv(model, output, *columns, *files, "--do_train", "--do_eval", *more)
