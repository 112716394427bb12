"""The model and data of the soak, and the settings of a stretch."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

BLOCKS, WIDTH, VOCABULARY, BATCH, ROWS = 4, 8, 32, 2, 512


@dataclass
class Stretch:
    """The settings of a stretch; `fault` is injected into a share `fault_rate` of the steps of its second half."""

    steps: int
    config: dict[str, Any]
    accumulation: int
    dropout: float
    checkpointing: bool
    clipping: float
    adamw: bool
    frozen: int
    logging: int
    evaluation: int
    fault: str
    fault_rate: float


def draw(choose: random.Random, steps: int) -> Stretch:
    """Draw random settings for a stretch of `steps` steps, from combinations that are supported."""
    selection = choose.choice(["top_k", "top_k", "last", "budget", "all", "none"])
    config: dict[str, Any] = {"block_selection": selection, "rho": 10 ** choose.uniform(-2, -0.5)}
    if selection in ("top_k", "last", "budget"):
        config["num_perturbed_blocks"] = choose.choice([1, 2, 3, None])
    if selection == "budget":
        config["max_overhead"] = choose.choice([0.4, 0.7, 1.0])
    if choose.random() < 0.3:
        config |= {"perturb_start": choose.choice([0.0, 0.25]), "perturb_end": choose.choice([0.75, 1.0])}
    method = choose.choice(["two passes", "two passes", "one pass", "looksam" if selection == "all" else "two passes"])
    if method == "one pass":
        config["ascent_gradient"] = "previous"
    elif method == "looksam":
        config |= {"perturb_interval": choose.choice([2, 5]), "reuse_correction": 0.7, "perturb_start": 0.0}
    else:
        config |= {
            "alpha": choose.choice([1.0, choose.uniform(0.2, 1.0)]),
            "perturb_interval": choose.choice([1, 1, 3]),
        }
        config["sharpness_scope"] = choose.choice(["batch", "micro_batch"])
        if choose.random() < 0.25:
            config |= {"adaptive": True, "rho": 10 * config["rho"]}
    # The reference predicts the cost for models without frozen layers.
    frozen = choose.choice([0, 0, 1]) if selection != "budget" else 0
    faults = ["none", "none", "zero"] if method == "one pass" else ["none", "zero", "not finite", "error"]
    return Stretch(
        steps=steps,
        config=config,
        accumulation=choose.choice([1, 2, 3, 4]),
        dropout=choose.choice([0.0, 0.1]),
        checkpointing=choose.random() < 0.25,
        clipping=choose.choice([0.0, 1.0]),
        adamw=choose.random() < 0.5,
        frozen=frozen,
        logging=choose.choice([0, 1, 20]),
        evaluation=choose.choice([0, 0, 50]),
        fault=choose.choice(faults),
        fault_rate=choose.choice([0.02, 0.2]),
    )


class Rows(Dataset):
    """Random tokens with random labels; some rows have token types and some do not, in runs as long as a batch."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCABULARY, (ROWS, 6), generator=generator)
        self.labels = torch.randint(0, 3, (ROWS,), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.tokens[index], "labels": self.labels[index]}
        return row | {"token_type_ids": self.tokens[index] % 2} if index // BATCH % 3 == 0 else row


class Layer(GradientCheckpointingLayer):
    """A residual block."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the same shape as `x`."""
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class TinyModel(PreTrainedModel):
    """A classifier of token sequences of one length, so small that the trainer takes most of the time of a step."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.tokens, self.types = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, token_type_ids: Tensor | None = None) -> ModelOutput:
        """The loss and the logits; without `token_type_ids` all of them are of type 0."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.tokens(input_ids) + self.types(types)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.mean(1))
        return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def build(seed: int) -> nn.Module:
    """The tiny model, in float64."""
    set_seed(seed)
    return TinyModel(PretrainedConfig()).double()
