"""``strategy="lowbit_sharded"``: FSDP2 and 8-bit optimizer states under an unchanged LightningModule.

How it works
    Parameters, gradients and optimizer states are cut along their rows and shared out over the ranks (ZeRO-3, or
    ZeRO-2 with ``reshard_after_forward=False``). ``fully_shard`` is applied to the model's repeated blocks and to its
    root. No rank count cuts a quantisation block, so states are the same numbers on any number of ranks.

Requirements
    ``import lightning as L``; any accelerator with a process group: gloo on CPUs, NCCL on GPUs. One rank works too.

Interactions
    A LightningModule whose ``configure_model`` shards by itself is left as it is. ``configure_optimizers`` is called
    after sharding; torch.optim optimizers become their 8-bit twins there. Clipping by norm is global.

Limitations
    Optimizers built before sharding are refused. ``type(model).__name__`` gets the prefix ``FSDP``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.strategies.model_parallel import _materialize_distributed_module
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from lowbit_lightning import optim
from lowbit_lightning.strategies import blocks
from lowbit_lightning.strategies.blocks import Policy

NAME = "lowbit_sharded"


class ShardedStrategy(ModelParallelStrategy):
    """Shard parameters, gradients and 8-bit optimizer states over all ranks.

    Args:
        policy: ``policy(name, module) -> bool``: which modules to gather as one. None: the repeated blocks, which are
            the outermost modules that stand beside another of their class in a ModuleList, ModuleDict or Sequential.
        reshard_after_forward: True gathers parameters again for the backward (ZeRO-3), False keeps them in between
            (ZeRO-2: a third less communication, the memory of the whole model's parameters). An integer: FSDP2's.
        optimizer_bits: torch.optim optimizers become their twins with states of 8 or 32 bits; None leaves them.
        gather_dtype: the dtype in which parameters are gathered and computed with; gradients are reduced in float32.
            "auto": bfloat16 where the precision plugin computes in it, else the parameters' own.
        replicas: how many groups of ranks hold a copy each (HSDP; gradients are reduced inside a group, then among
            groups); it must divide the number of ranks. The number of nodes is the usual choice.
        save_distributed_checkpoint: True: a folder, each rank writes its part. False: one file, gathered on rank 0.
        process_group_backend, timeout: as for ``ModelParallelStrategy``.

    Raises:
        ValueError: an argument out of range; when a run begins, ``replicas`` that do not divide the ranks, a policy
            that chooses nothing, or an optimizer that holds parameters of the model before it was sharded.
    """

    strategy_name = NAME

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        reshard_after_forward: bool | int = True,
        optimizer_bits: Literal[8, 32] | None = 8,
        gather_dtype: torch.dtype | Literal["auto"] | None = "auto",
        replicas: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if optimizer_bits not in (8, 32, None):
            raise ValueError(f"optimizer_bits must be 8, 32 or None, got {optimizer_bits!r}")
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas!r}")
        if gather_dtype not in ("auto", None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"gather_dtype must be 'auto', None or a torch float dtype, got {gather_dtype!r}")
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.policy, self.reshard_after_forward = policy, reshard_after_forward
        self.optimizer_bits, self.gather_dtype, self.replicas = optimizer_bits, gather_dtype, replicas

    # -- the processes -----------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise ValueError(f"replicas must divide the number of ranks, {ranks}; got {self.replicas}")
        self._data_parallel_size, self._tensor_parallel_size = ranks, 1
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _mesh(self) -> DeviceMesh:
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        shape = self.replicas, self.world_size // self.replicas
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    # -- the model ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        # FSDP2's parameters can't be made in inference mode, where Lightning evaluates by default under NCCL.
        fit_loop = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        self.model = self.precision_plugin.convert_module(self.model)
        if not blocks.is_sharded(self.model):
            self._shard(self.model)
        _materialize_distributed_module(self.model, self.root_device)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, model: nn.Module) -> None:
        if not blocks.on_meta(model):
            blocks.start_equal(model, self.root_device)
        names = blocks.chosen_blocks(model, self.policy)
        options = {"mp_policy": MixedPrecisionPolicy(self._gather_dtype(), torch.float32, cast_forward_inputs=False)}
        blocks.shard(model, names, self._mesh(), self.reshard_after_forward, **options)
        what = f"{len(names)} blocks and the root" if names else "the whole model as one: it has no repeated blocks"
        rank_zero_info(f"{NAME}: shards {what} over {self.world_size // self.replicas} ranks")

    def _gather_dtype(self) -> torch.dtype | None:
        if self.gather_dtype != "auto":
            return self.gather_dtype  # type: ignore[return-value]
        with self.precision_plugin.forward_context():
            kind = self.root_device.type
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    # -- the optimizers ----------------------------------------------------------------------------------------------

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.model is not None
        current = set(self.model.parameters())
        for number, optimizer in enumerate(self.optimizers):
            stale = sum(p not in current for group in optimizer.param_groups for p in group["params"])
            if stale:
                raise ValueError(
                    f"optimizer {number} ({type(optimizer).__name__}) holds {stale} parameters that the sharded model "
                    "has not: it was built before sharding. Build it in configure_optimizers, from self.parameters()"
                )
            self._convert(optimizer)

    def _convert(self, optimizer: Optimizer) -> None:
        if self.optimizer_bits is None or isinstance(optimizer, optim.LowBitOptimizer):
            return
        if type(optimizer).__module__.split(".")[0] == "torch":
            optim.convert_(optimizer, bits=self.optimizer_bits)
        else:
            rank_zero_warn(
                f"{NAME} leaves {type(optimizer).__name__} as it is: only torch.optim's own optimizers have low-bit "
                "twins. optimizer_bits=None says that this is meant"
            )

    # -- the steps ---------------------------------------------------------------------------------------------------
    #
    # A step that never calls self.forward would see sharded parameters: each goes through the root's __call__.

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._through_root("training_step", self.precision_plugin.train_step_context(), *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._through_root("validation_step", self.precision_plugin.val_step_context(), *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._through_root("test_step", self.precision_plugin.test_step_context(), *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._through_root("predict_step", self.precision_plugin.predict_step_context(), *args, **kwargs)

    def _through_root(self, name: str, context: AbstractContextManager, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        assert self.lightning_module is not None
        if not isinstance(self.model, FSDPModule):  # configure_model sharded parts of the model only
            with context:
                return getattr(self.lightning_module, name)(*args, **kwargs)
        with context:
            return self._forward_redirection(self.model, self.lightning_module, name, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients accumulate, none are reduced among ranks: they stay whole until the last backward."""
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]  # type: ignore
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)
