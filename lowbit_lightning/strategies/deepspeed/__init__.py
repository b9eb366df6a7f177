"""DeepSpeed's ZeRO with low-bit optimizers: ``DeepSpeedStrategy`` and what it refuses. Imports no ``deepspeed``."""

from lowbit_lightning.strategies.deepspeed.config import check_deepspeed
from lowbit_lightning.strategies.deepspeed.strategy import NAME, DeepSpeedStrategy

__all__ = ["NAME", "DeepSpeedStrategy", "check_deepspeed"]
