"""``strategy="lowbit_sharded"``: FSDP2 and 8-bit optimizer states under an unchanged LightningModule.

How it works
    Parameters, gradients and optimizer states are cut along their rows and distributed over the ranks (ZeRO-3, or
    ZeRO-2 with ``reshard_after_forward=False``). ``fully_shard`` is applied to the model's repeated blocks and to its
    root. No number of ranks cuts a quantisation block, so states are the same numbers on any number of ranks.

Requirements
    ``import lightning as L``; any accelerator with a process group: gloo on CPUs, NCCL on GPUs. One rank works too.

Interactions
    A LightningModule whose ``configure_model`` shards the model is left unchanged. ``configure_optimizers`` is called
    after sharding; torch.optim optimizers become their 8-bit twins there. Clipping by norm is global. Buffers are rank
    0's on all ranks, as under DDP; ``Trainer(sync_batchnorm=True)`` is applied before sharding.

Limitations
    Optimizers built before sharding are refused. ``type(model).__name__`` gets the prefix ``FSDP``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import _materialize_distributed_module
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from lowbit_lightning.optim.loading import all_or_nothing
from lowbit_lightning.optim.options import check_paging
from lowbit_lightning.sharding import Policy, chosen_blocks, mesh_shape
from lowbit_lightning.state import shards
from lowbit_lightning.strategies import atomic, blocks, buffers, checkpoints
from lowbit_lightning.strategies.callbacks import add_groups, forget_groups, refuse_copies
from lowbit_lightning.strategies.checkpoints import AtomicCheckpointIO
from lowbit_lightning.strategies.gather import gather_in_int8
from lowbit_lightning.strategies.optimizers import adapt

NAME = "lowbit_sharded"


class ShardedStrategy(ModelParallelStrategy):
    """Shard parameters, gradients and 8-bit optimizer states over all ranks.

    Args:
        policy: ``policy(name, module) -> bool``: which modules to gather as one unit. None: the repeated blocks, which
            are the outermost modules that stand beside another of their class in a ModuleList, ModuleDict or
            Sequential. Not used under manual optimization: there each module that a step calls is sharded separately,
            and always gathered again for the backward.
        reshard_after_forward: True gathers parameters again for the backward (ZeRO-3), False keeps them in between
            (ZeRO-2: a third less communication, the memory of the whole model's parameters). An integer: FSDP2's.
        optimizer_bits: torch.optim optimizers become their twins with states of 8 or 32 bits; None leaves them.
        gather_dtype: the dtype in which parameters are gathered and computed with; gradients are reduced in float32.
            "auto": bfloat16 if the precision plugin computes in it, otherwise the parameters' own dtype.
        all_gather: "int8": matrices are gathered quantised by rows, one byte per element (``strategies.gather``), and
            forward and backward compute with the gathered values. "high": gathered unquantised.
        replicas: how many groups of ranks hold one copy each (HSDP; gradients are reduced inside a group, then among
            groups); it must divide the number of ranks. The number of nodes is the usual choice.
        paged, resident, page_dir: page the states of all low-bit optimizers; each rank pages its own part. These are
            the options of ``lowbit_lightning.optim`` (docs/paging.md). ``resident`` is bytes per rank.
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
        all_gather: Literal["high", "int8"] = "high",
        replicas: int = 1,
        paged: bool | Literal["disk"] = False,
        resident: int | str = 0,
        page_dir: str | None = None,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if optimizer_bits not in (8, 32, None):
            raise ValueError(f"optimizer_bits must be 8, 32 or None, got {optimizer_bits!r}")
        if all_gather not in ("high", "int8"):
            raise ValueError(f"all_gather must be 'high' or 'int8', got {all_gather!r}")
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas!r}")
        if gather_dtype not in ("auto", None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"gather_dtype must be 'auto', None or a torch float dtype, got {gather_dtype!r}")
        self._paging = {"paged": paged, "resident": resident, "page_dir": page_dir}
        check_paging(self._paging)
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.policy, self.reshard_after_forward = policy, reshard_after_forward
        self.optimizer_bits, self.gather_dtype, self.replicas = optimizer_bits, gather_dtype, replicas
        self._gathers_int8 = all_gather == "int8"
        self._buffers_differ = True  # among ranks: since a training step, or since they were made

    # -- the processes -----------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        mesh_shape(ranks, self.replicas)  # refuses what does not divide them
        self._data_parallel_size, self._tensor_parallel_size = ranks, 1
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _mesh(self) -> DeviceMesh:
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        if self.root_device.type == "cpu":
            blocks.needs_torch("2.8", f"{NAME} with replicas={self.replicas} on CPUs", "gloo has no average before")
        shape = mesh_shape(self.world_size, self.replicas)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def teardown(self) -> None:
        """Waits for what AsyncCheckpointIO still writes, and raises what it could not write, as under DDP."""
        super().teardown()
        self.checkpoint_io.teardown()

    # -- the model ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        refuse_copies(trainer, NAME)
        # FSDP2's parameters can't be made in inference mode, where Lightning evaluates by default under NCCL.
        fit_loop = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        self.model = self.precision_plugin.convert_module(self.model)
        if blocks.is_sharded(self.model):
            buffers.check_layer_sync(self.model, self._layer_sync)
            blocks.average_gradients(self.model, self._mesh())
        else:
            self.model = self._layer_sync.apply(self.model) if self._layer_sync else self.model
            self._shard(self.model)
        self._buffers_differ = True
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
        if self._gather_dtype() is not None:
            buffers.widen(model)
        options = {"mp_policy": MixedPrecisionPolicy(self._gather_dtype(), torch.float32, cast_forward_inputs=False)}
        assert self.lightning_module is not None
        # Backward runs inside a step of manual optimization. FSDP2 would take it for a part of the root's forward, and
        # finish nothing that belongs to it: there each module that the step calls is a root.
        whole = self.lightning_module.automatic_optimization
        for root in [model] if whole else map(model.get_submodule, blocks.roots(model)):
            names = chosen_blocks(root, self.policy if whole else None)
            # A forward without a backward (another optimizer's turn) would leave parameters gathered, with the
            # requires_grad of that turn.
            again = self.reshard_after_forward if whole else True
            blocks.shard(root, names, self._mesh(), again, reshard_root=not whole, **options)
            if self._gathers_int8:
                gather_in_int8(root)
        parts = sum(isinstance(module, FSDPModule) for module in model.modules())
        what = f"{parts} parts" if parts > 1 else "the whole model as one part: it has no repeated blocks"
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
                    "does not have: it was built before sharding. Build it in configure_optimizers, from "
                    "self.parameters()"
                )
            adapt(optimizer, self.optimizer_bits, self._paging, NAME)

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
        self._share_buffers()
        self._buffers_differ = name == "training_step"
        with context:
            if not isinstance(self.model, FSDPModule):  # configure_model, or manual optimization: parts are sharded
                return getattr(self.lightning_module, name)(*args, **kwargs)
            result = self._forward_redirection(self.model, self.lightning_module, name, *args, **kwargs)
            if name != "training_step":
                self.model.reshard()  # no backward will; callbacks and the next optimizer are to see shards
            return result

    def _share_buffers(self) -> None:
        """A collective."""
        if self._buffers_differ:
            assert self.model is not None
            buffers.share(self.model)
            self._buffers_differ = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients accumulate, they are not reduced among ranks: they stay unsharded until the last backward."""
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]  # type: ignore
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    # -- checkpoints -------------------------------------------------------------------------------------------------
    #
    # Optimizer states are kept by the parameter's number, as on a single device, and go through the optimizer's own
    # state_dict. torch's get_optimizer_state_dict steps an optimizer that has no state yet, and counts that step.

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin that writes and reads a single file. It is AtomicCheckpointIO unless the Trainer was given
        another. Wrappers, such as AsyncCheckpointIO, wrap that plugin, unless they were given another."""
        io = self._checkpoint_io = self._checkpoint_io or AtomicCheckpointIO()
        wrapper: CheckpointIO | None = io
        while isinstance(wrapper, _WrappingCheckpointIO):
            if wrapper.checkpoint_io is None:
                wrapper.checkpoint_io = AtomicCheckpointIO()
            wrapper = wrapper.checkpoint_io
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: as they are placed for a folder; for a single file whole, on rank 0, and nothing elsewhere."""
        assert self.lightning_module is not None
        self._share_buffers()  # each rank writes some of them into a folder
        state = dict(self.lightning_module.state_dict())
        first: dict[Tensor, str] = {}
        for name, p in self.lightning_module.named_parameters(remove_duplicate=False):
            if name in state:  # tied weights: one tensor under all of its names
                state[name] = state[first.setdefault(p, name)]
        return self._saved(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state_dict, likewise."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved = inner.state_dict()
        state = {key: self._saved(entries) for key, entries in saved["state"].items()}
        return {**saved, "state": state} if self._save_distributed_checkpoint or self.is_global_zero else {}

    def _saved(self, entries: dict[str, Any]) -> dict[str, Any]:
        """A collective: gathers one tensor after the other, and keeps them on the CPU of rank 0."""
        if self._save_distributed_checkpoint:
            return entries
        whole: dict[int, Any] = {}
        for value in entries.values():
            if id(value) not in whole:
                full = shards.full(value) if isinstance(value, Tensor) else value
                whole[id(value)] = _compact(full) if self.is_global_zero else None
        return {name: whole[id(value)] for name, value in entries.items()} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        path = self.broadcast(filepath)
        if not self._save_distributed_checkpoint:

            def write() -> None:
                if self.is_global_zero:
                    self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

            self._together(write)  # else the other ranks would wait for one that has failed
            return
        if storage_options is not None or checkpoints.is_remote(path):
            raise TypeError(f"a distributed checkpoint goes to a local folder, without storage_options; got {path}")
        token = self.broadcast(checkpoints.new_token())
        checkpoints.save_folder(checkpoint, Path(path), token, self.is_global_zero, self._together)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy and number of ranks; nothing is put into place yet.

        Raises:
            FileNotFoundError, ValueError: naming the path, on all ranks.
        """
        self._source = path = self.broadcast(checkpoint_path)
        if checkpoints.is_remote(path) or type(self.checkpoint_io) is not AtomicCheckpointIO:
            return self._together(lambda: self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))
        found = self._together(lambda: atomic.locate(Path(path)))
        if not found.is_dir():
            return self._together(lambda: checkpoints.load_file(found, weights_only, mmap=True))
        optimizers = self.optimizers if self._is_fitting() else []
        return checkpoints.load_folder(found, weights_only, self.lightning_module, optimizers, self._together)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put weights and optimizer states in place. If something does not fit, raise on all ranks and change
        nothing."""
        model = self.lightning_module
        assert model is not None
        weights = self._together(lambda: checkpoints.fitted(model, checkpoint["state_dict"], strict, self._source))
        if self._is_fitting():
            with all_or_nothing(self.optimizers):
                add_groups(model.trainer, checkpoint)
                self._together(lambda: checkpoints.load_optimizers(self.optimizers, checkpoint, self._source))
        model.load_state_dict(weights, strict=strict)

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        forget_groups(self.lightning_module.trainer)

    def _is_fitting(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    def _together(self, action: Callable[[], Any]) -> Any:
        """The action's result; raises on all ranks if it raises on one."""
        result, problem = None, None
        try:
            result = action()
        except Exception as error:
            problem = error
        problems: list[str | None] = [None] * self.world_size
        dist.all_gather_object(problems, None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        for rank, other in enumerate(problems):
            if other is not None:
                raise RuntimeError(f"rank {rank} failed: {other}")
        return result


def _compact(value: Any) -> Any:
    """On the CPU, without the rest of the storage of a view, which would also be written into the file."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
