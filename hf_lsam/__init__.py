"""Layer-wise sharpness-aware minimisation for the Hugging Face Trainer."""

from .config import LSAMConfig
from .trainer import LSAMMixin, LSAMTrainer

__all__ = ["LSAMConfig", "LSAMMixin", "LSAMTrainer"]
