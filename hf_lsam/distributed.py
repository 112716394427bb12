"""What ways of running are supported, refused before training with the reason and the way out."""

from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .config import LSAMConfig

# Optimizers that update the weights inside the backward pass: pass 1 would already train.
_UPDATE_IN_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}


def check_supported(trainer: Trainer, config: LSAMConfig) -> None:
    """
    Refuse what would give wrong results.

    Raises:
        NotImplementedError: names the setting, the reason and the way out.
    """
    args = trainer.args
    way_out = "Set it otherwise, or train plainly with LSAMConfig(block_selection='none')."
    distributed_type = trainer.accelerator.distributed_type
    if distributed_type != DistributedType.NO:
        raise NotImplementedError(
            f"LSAMTrainer runs in one process so far, and this run is {distributed_type.value}: the selected blocks "
            f"and their gradients would have to be agreed on by all processes. Launch one process. {way_out}"
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"torch.nn.DataParallel copies the model to {args.n_gpu} GPUs in each pass, so blocks cannot be replayed. "
            f"Make one GPU visible (CUDA_VISIBLE_DEVICES=0). {way_out}"
        )
    if args.optim in _UPDATE_IN_BACKWARD:
        raise NotImplementedError(
            f"optim={args.optim} updates the weights inside the backward pass, so there is no gradient left to "
            f"perturb by. {way_out}"
        )
    if args.torch_compile and config.ascent_gradient == "current":
        raise NotImplementedError(
            "torch_compile=True compiles the whole model, and each set of selected blocks would compile it anew. Use "
            f"ascent_gradient='previous', which compiles once. {way_out}"
        )
