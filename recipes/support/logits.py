"""The loss of a classifier or a regression, and the logits that its metrics are computed from."""

import numpy as np
import torch


def make_compute_loss(label_smoothing: float, is_regression: bool = False):
    """
    The `compute_loss_func` of the Trainer for a classifier, or a regression: the mean over all rows of an optimizer
    step.

    BERT and similar models average over a micro-batch and ignore the number of rows that the Trainer passes: with
    gradient accumulation, or in several processes, their own loss would be too large by that factor.
    """

    def compute_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"]
        if is_regression:
            total = torch.nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
        else:
            total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return compute_loss


def read_logits(predictions: np.ndarray | tuple) -> np.ndarray:
    """The logits; some models return hidden states after them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions
