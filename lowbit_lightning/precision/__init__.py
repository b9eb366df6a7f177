"""The Lightning and Fabric plugins of ``precision="int8-mixed"``, and the registration of that string.

Requirements
    Lightning 2.5 or 2.6, imported as ``lightning``. ``pytorch_lightning`` is a separate copy of its classes; an error
    refuses it and names it.

How it works
    ``convert_module`` swaps the model's ``nn.Linear`` for ``Int8Linear`` in place (``convert.swap_linears`` has the
    filter); weights, gradients and optimizer see no difference. Everything else runs as in "bf16-mixed": under bf16
    autocast where the hardware computes in bf16, in float32 elsewhere. There is no loss scaling: bf16 and int8 with
    dynamic scales need none.

    Lightning has no registry for precision strings, so ``register`` wraps the constructor of the two classes that
    read them (the connectors of Trainer and Fabric) and turns the string into a plugin. ``register`` first checks the
    parts of Lightning that it relies on. If they have changed, it warns and leaves Lightning unchanged
    (``plugins=[...]`` needs no registration). Once Lightning itself knows the string, it does nothing.

Interactions
    Under a Trainer, with any precision, the optimizers of ``lowbit_lightning.optim`` unscale, clip and skip in
    their step (``in_step.py``). The environment variables ``PL_TRAINER_PRECISION`` and ``LT_PRECISION`` work like the
    argument. When a run of the Trainer ends, the layers are plain again; with Fabric, ``convert.restore(model)`` turns
    them back.

Limitations
    FSDP1, XLA and Lightning's own DeepSpeed strategies bring a precision plugin of their own and are refused. Under
    ``lowbit_deepspeed_stage_2`` and its like the plugin takes a form that leaves backward and step to the engine.
"""

from lowbit_lightning.precision.int8 import FabricInt8MixedPrecision, Int8MixedPrecision
from lowbit_lightning.precision.low_bit_weights import LowBitWeights
from lowbit_lightning.precision.registration import PrecisionNotApplied, register

__all__ = ["FabricInt8MixedPrecision", "Int8MixedPrecision", "LowBitWeights", "PrecisionNotApplied", "register"]
