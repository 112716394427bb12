"""The workload of the benchmark: a model, and rows of tokens."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    set_seed,
)

# Token ids below are special in most vocabularies.
_FIRST_TOKEN = 1000
# Width of a head of the random BERT.
_HEAD = 64


@dataclass
class WorkloadArguments:
    """The model and data of the benchmark."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Name on the Hub, or folder, of a model; without it, a BERT of random weights."},
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Use the configuration of that model with random weights."}
    )
    causal_lm: bool = field(default=False, metadata={"help": "Train a language model instead of a classifier."})
    lora: bool = field(
        default=False, metadata={"help": "Train LoRA adapters (rank 8, attention) instead of the weights."}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "Text file that is split into rows; without it, random tokens."}
    )
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks of the random BERT."})
    hidden_size: int = field(default=384, metadata={"help": "Its width; heads are 64 wide."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    bf16: bool = field(default=False, metadata={"help": "Train under bf16 autocast."})

    def __post_init__(self):
        for name in ("num_hidden_layers", "batch_size", "sequence_length", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.model_name_or_path is None and (self.hidden_size < _HEAD or self.hidden_size % _HEAD):
            raise ValueError(
                f"hidden_size must be a multiple of {_HEAD}, the width of a head, but is {self.hidden_size}."
            )


def make_model(args: WorkloadArguments) -> PreTrainedModel:
    """The model, on the GPU if there is one, with the same weights at each call."""
    set_seed(0)
    kind = AutoModelForCausalLM if args.causal_lm else AutoModelForSequenceClassification
    if args.model_name_or_path is None:
        config = BertConfig(
            num_hidden_layers=args.num_hidden_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.hidden_size // _HEAD,
            intermediate_size=4 * args.hidden_size,
            is_decoder=args.causal_lm,
        )
    elif args.random_weights:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
    # On the GPU if possible, since a CPU takes long to initialise a large model.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if args.model_name_or_path is not None and not args.random_weights:
            model = kind.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        else:
            model = kind.from_config(config, dtype=torch.float32)
    if args.lora:
        task = TaskType.CAUSAL_LM if args.causal_lm else TaskType.SEQ_CLS
        model = get_peft_model(model, LoraConfig(r=8, task_type=task))
    return model


class Rows(Dataset):
    """
    Rows of tokens of one length; labels are 0 and 1 in turn or, for a language model, the tokens.

    Args:
        count: Number of rows. A text that is too short is repeated.
        args: The text, if any, and the length of a row.
        vocabulary: Size of the vocabulary; random tokens are drawn from it.

    Raises:
        ValueError: if `text_file` is set without a model, or is empty.
    """

    def __init__(self, count: int, args: WorkloadArguments, vocabulary: int):
        self.causal_lm = args.causal_lm
        size = count * args.sequence_length
        if args.text_file is None:
            generator = torch.Generator().manual_seed(0)
            first = min(_FIRST_TOKEN, vocabulary // 2)
            tokens = torch.randint(first, vocabulary, (size,), generator=generator)
        else:
            if args.model_name_or_path is None:
                raise ValueError("text_file needs the tokenizer of a model: set model_name_or_path too.")
            tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
            # More than 8 characters for a token would be unusual, and tokenizing a whole book is slow.
            text = Path(args.text_file).read_text(encoding="utf-8")[: 8 * size]
            found = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if not len(found):
                raise ValueError(f"text_file={args.text_file} is empty.")
            tokens = found.repeat(-(-size // len(found)))[:size]
        self.tokens = tokens.view(count, args.sequence_length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": tokens if self.causal_lm else torch.tensor(index % 2)}
