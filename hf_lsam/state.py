"""Save and load what one step takes over from the last: the gradients of one pass and of LookSAM, and the log."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from .account import Account
from .ascent import Ascent
from .shards import is_sharded, reshard
from .step import LSAMStep

logger = logging.get_logger(__name__)

STATE_FILE = "lsam_state.safetensors"
# The fields of an ascent that are tensors of a weight's shape; the others are small, and saved as JSON.
_LARGE = ("weights", "gradients", "direction")


def save_state(step: LSAMStep, checkpoint: str, global_step: int, should_save: bool = True) -> None:
    """Write the state at the beginning of step `global_step` to the folder `checkpoint`; `OSError` if that fails.

    Every process has to call it, since sharded tensors are gathered from all; those that `should_save` write.
    """
    # A run that is killed in here leaves no checkpoint to resume from: `trainer_state.json` is written afterwards.
    kept = step.state_at(global_step)
    reshard(step.sharded_modules)
    contents: dict[str, Any] = {"step": global_step, "config": asdict(step.config), "log": kept.log.state()}
    if kept.account is not None:
        contents["account"] = asdict(kept.account)
    if kept.previous is not None:
        weights, direction = kept.previous.weights, kept.previous.direction
        small = {name: value for name, value in vars(kept.previous).items() if name not in _LARGE}
        contents["previous"] = small | {name: small[name].tolist() for name in ("squares", "norm")}
    else:
        weights, direction = kept.correction or ([], [])
    names: dict[Tensor, str] = {parameter: name for name, parameter in step.model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for weight, tensor in zip(weights, direction, strict=True):
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if should_save:
            tensors[names[weight]] = whole.contiguous()
    if not should_save:
        return
    contents["weights"] = list(tensors)
    contents["candidates"] = [candidate.name for candidate in step.candidates]
    draft = Path(checkpoint) / f"{STATE_FILE}.draft"
    try:
        save_file(tensors, draft, metadata={"lsam": json.dumps(contents)})
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{draft.with_suffix('')} could not be written ({error}), so {checkpoint} cannot be resumed from. Check "
            "disk space and write access, remove this checkpoint, and resume from the one before."
        ) from error
    draft.replace(draft.with_suffix(""))


def load_state(step: LSAMStep, checkpoint: str) -> int:
    """Load into `step` the state that `save_state` wrote to the folder `checkpoint`; returns the number of its step.

    If there is no file (a checkpoint of the plain Trainer), or it was saved with other settings or blocks, it warns
    and loads nothing: one pass and LookSAM begin again. `ValueError` if the file is damaged or of another model.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.exists():
        logger.warning(f"{checkpoint} holds no {STATE_FILE}: layer-wise SAM starts without state of earlier steps.")
        return 0
    try:
        # Whole tensors that are to be sharded need not fit the device.
        device = "cpu" if is_sharded(step.model.parameters()) else str(step.second_pass.state.device)
        with safe_open(path, framework="pt", device=device) as file:
            contents = json.loads(file.metadata()["lsam"])
            tensors = {name: file.get_tensor(name) for name in contents["weights"]}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Resume from an earlier checkpoint, or delete the file to go on without it."
        ) from error
    saved, current = contents["config"], asdict(step.config)
    changed = sorted(name for name in current if saved.get(name) != current[name])
    if contents["candidates"] != [candidate.name for candidate in step.candidates]:
        changed.append("the blocks to select from")
    if changed:
        what = f"{checkpoint} was saved with other settings of layer-wise SAM ({', '.join(changed)})"
        logger.warning(f"{what}: its state is not used.")
        return int(contents.get("step", 0))
    parameters: dict[str, Tensor] = dict(step.model.named_parameters())
    for name, tensor in tensors.items():
        like = parameters.get(name)
        if like is None or like.shape != tensor.shape:
            raise ValueError(
                f"{path} belongs to another model: it holds {name} of shape {tuple(tensor.shape)}. Resume with the "
                "model that it was saved with, or delete the file to go on without it."
            )
        if isinstance(like, DTensor):
            # Every process has read the tensor.
            shard = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
            tensors[name] = shard.to(like.device)
    step.log.load(contents["log"])
    if (account := contents.get("account")) is not None:
        account = Account(**account | {"terms": tuple(account["terms"])})
    step.account = account
    weights, direction = [parameters[name] for name in tensors], list(tensors.values())
    if "previous" in contents:
        saved = contents["previous"]
        saved |= {name: torch.tensor(saved[name], dtype=torch.float64) for name in ("squares", "norm")}
        step.previous = Ascent(**saved, weights=weights, gradients=[], direction=direction)
    elif weights:
        step.correction = (weights, direction)
    return int(contents.get("step", 0))
