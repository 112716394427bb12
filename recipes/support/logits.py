"""The loss of a classification or regression model, and the logits for its metrics."""

import numpy as np
import torch


def make_compute_loss(label_smoothing: float, is_regression: bool = False):
    """
    Make the `compute_loss_func` of the Trainer: the mean loss over all examples of an optimizer step.

    BERT and similar models average over a micro-batch and ignore the number of examples that the Trainer passes. With
    gradient accumulation or several processes, their own loss would be too large by the number of micro-batches.

    Args:
        label_smoothing (`float`): Label smoothing of the cross-entropy, from 0 to 1.
        is_regression (`bool`, *optional*, defaults to `False`): Use the squared error instead of the cross-entropy.
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
    """The logits among the `predictions` of a Trainer; some models return hidden states after them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions
