"""What the names of metrics say: of which part of the data they are, and whether they judge the model."""

# Longer ones first: `eval_mm_accuracy` is the accuracy of `eval_mm`.
SPLITS = ("eval_mm", "predict_mm", "eval", "predict", "test", "shift")
# How much was evaluated, and how fast.
_AMOUNTS = ("runtime", "samples", "_per_second", "_time", "tokens", "truncated", "dropped", "temperature")


def find_score(name: str) -> str | None:
    """`accuracy` for `eval_accuracy`; `None` for a figure that does not say how good a model is."""
    for split in SPLITS:
        if name.startswith(f"{split}_"):
            return None if name.endswith(_AMOUNTS) else name.removeprefix(f"{split}_")
    return None
