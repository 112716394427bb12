"""Names of metrics: their split, and whether they are scores of the model."""

# Longer prefixes first: `eval_mm_accuracy` is the accuracy of `eval_mm`.
SPLITS = ("eval_mm", "predict_mm", "eval", "predict", "test", "shift")
# Endings of values that are not scores: counts, times and the temperature.
_NOT_SCORES = ("runtime", "samples", "_per_second", "_time", "tokens", "truncated", "dropped", "temperature")


def find_score(name: str) -> str | None:
    """The name without its split, such as `accuracy` for `eval_accuracy`; `None` if it is not a score of the model."""
    for split in SPLITS:
        if name.startswith(f"{split}_"):
            return None if name.endswith(_NOT_SCORES) else name.removeprefix(f"{split}_")
    return None
