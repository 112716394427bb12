"""Layer-wise sharpness-aware minimisation for the Hugging Face Trainer."""

from .config import LSAMConfig
from .trainer import LSAMMixin, LSAMTrainer

__version__ = "0.1.0"

__all__ = ["LSAMConfig", "LSAMMixin", "LSAMTrainer"]
