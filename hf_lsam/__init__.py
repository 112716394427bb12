"""Layer-wise sharpness-aware minimisation for the Hugging Face Trainer."""

from .config import LSAMConfig
from .loop import LSAM
from .trainer import LSAMMixin, LSAMTrainer

__version__ = "0.1.0"

__all__ = ["LSAM", "LSAMConfig", "LSAMMixin", "LSAMTrainer"]
