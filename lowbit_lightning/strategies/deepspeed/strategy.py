"""``strategy="lowbit_deepspeed_stage_2"`` and similar names: DeepSpeed's ZeRO with low-bit optimizers.

How it works
    This is Lightning's DeepSpeedStrategy, with an optimizer of this package as DeepSpeed's client optimizer. ZeRO
    concatenates the parameters of a group and cuts the vector. The optimizer steps each rank's piece, so codes and
    scales are those of the piece. Groups are split first, so that vectors and embeddings keep 32-bit states
    (``groups.py``).

Requirements
    ``deepspeed`` (the extra of that name), which is imported when a strategy is made. CUDA with NCCL, or CPUs with
    gloo. ``import lightning as L``.

Interactions
    Clipping by norm, accumulation and loss scaling are DeepSpeed's. Checkpoints hold float32 states, in DeepSpeed's
    own form; another number of ranks reads them after DeepSpeed's converter (``load_checkpoint``).

Limitations
    One optimizer. ``config.check_deepspeed`` refuses some options. The block grid depends on the number of ranks.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import strategies
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT, LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning import optim
from lowbit_lightning.layers.experts import pass_matrices_on
from lowbit_lightning.optim.options import check_paging
from lowbit_lightning.strategies.atomic import naming_a_full_disk
from lowbit_lightning.strategies.deepspeed import checkpoints
from lowbit_lightning.strategies.deepspeed.config import check_deepspeed, complete, read
from lowbit_lightning.strategies.deepspeed.groups import SplitGroups
from lowbit_lightning.strategies.optimizers import adapt

NAME = "lowbit_deepspeed"
STEP = "_lowbit_lightning_step"
BESIDE_CONFIG = {
    *("accelerator", "cluster_environment", "exclude_frozen_parameters", "hysteresis", "initial_scale_power"),
    *("load_full_weights", "logging_level", "loss_scale", "loss_scale_window", "min_loss_scale", "parallel_devices"),
    *("precision_plugin", "process_group_backend", "remote_device", "timeout"),
}
"""Arguments of Lightning's strategy that hold together with a ``config``; it ignores the others then."""


GIVEN = {"config", "stage", "zero_allow_untested_optimizer", "zero_optimization"}
"""Arguments of Lightning's strategy that we have given a meaning or a value of our own."""


class _LightningsStrategy(strategies.DeepSpeedStrategy):
    """It hides its namesake from LightningCLI, which looks for a bare ``--trainer.strategy=DeepSpeedStrategy`` among
    subclasses: that remains Lightning's."""

    @classmethod
    def __subclasses__(cls) -> list[type]:  # type: ignore[override]
        return []


class DeepSpeedStrategy(_LightningsStrategy):
    """DeepSpeed's ZeRO with optimizer states in 8 bits, under an unchanged LightningModule.

    Args:
        stage: what is sharded over the ranks: 1 optimizer states, 2 gradients too, 3 parameters too. None: the config's
            stage, or 2.
        optimizer_bits: torch.optim optimizers become their twins with states of 8 or 32 bits; None leaves them.
        config: DeepSpeed's whole configuration: a dict, an OmegaConf DictConfig, or the path of a JSON or YAML file.
            None: the file that PL_DEEPSPEED_CONFIG_PATH names, or a configuration made from ``options``.
        paged, resident, page_dir: page the states of low-bit optimizers; each rank pages its own part. These are the
            options of ``lowbit_lightning.optim`` (docs/paging.md). ``resident`` is bytes per rank.
        options: Lightning's arguments, such as ``offload_optimizer=True`` (states on the host, stepped there).

    Raises:
        TypeError, ValueError: for arguments out of range, options that a config overrides, and options that
            ``check_deepspeed`` refuses; for an optimizer, when a run begins.
    """

    strategy_name = NAME
    runs_int8_in_engine = True  # what gives "int8-mixed" the form of its plugin that DeepSpeed wants

    def __init__(
        self,
        stage: int | None = None,
        *,
        optimizer_bits: Literal[8, 32] | None = 8,
        config: Any = None,
        paged: bool | Literal["disk"] = False,
        resident: int | str = 0,
        page_dir: str | None = None,
        **options: Any,
    ) -> None:
        if optimizer_bits not in (8, 32, None):
            raise ValueError(f"optimizer_bits must be 8, 32 or None, got {optimizer_bits!r}")
        self._paging = {"paged": paged, "resident": resident, "page_dir": page_dir}
        check_paging(self._paging)
        known = set(inspect.signature(strategies.DeepSpeedStrategy).parameters) - GIVEN
        if not set(options) <= known:
            raise TypeError(f"unknown options {sorted(set(options) - known)}; known: {sorted(known)}")
        source = "config"
        if config is None:
            source, config = f"the file of {self.DEEPSPEED_ENV_VAR}", os.environ.get(self.DEEPSPEED_ENV_VAR)
        _import_deepspeed()
        if config is None:
            super().__init__(stage=2 if stage is None else stage, **options)
            config = self.config
        else:
            ignored = sorted(set(options) - BESIDE_CONFIG)
            if ignored:
                raise ValueError(f"{source} holds the whole configuration; put {ignored} into it")
            config = read(config)
            super().__init__(config=config, **options)
        self.config = complete(config, stage)
        self.optimizer_bits = optimizer_bits
        self._groups: SplitGroups | None = None
        self._given: dict[str, Any] = {}  # the configuration without what Lightning writes into it for a Trainer
        self._backwards = 0  # since the last step
        checked = {key: value for key, value in config.items() if key != "optimizer" or optimizer_bits is not None}
        check_deepspeed(checked)
        if paged is True and (config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu":
            raise ValueError(
                "paged=True and offload_optimizer both keep states on the host: choose paged=True to step them on the "
                "GPU, or offload_optimizer to step them on the host"
            )

    # -- the processes -----------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        if self._config_initialized:  # by another run, with its clipping and accumulation
            self.config, self._config_initialized = self._given, False
        self._given = copy.deepcopy(self.config or {})
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        kind = self.root_device.type
        if get_accelerator().device_name() != kind:
            raise RuntimeError(
                f"accelerator={kind!r}, but DeepSpeed chose {get_accelerator().device_name()!r} when it was imported: "
                f"set the environment variable DS_ACCELERATOR={kind} before"
            )
        if kind == "cpu":  # a C++ extension that saves a copy; DeepSpeed would compile it now
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)  # Lightning's own refuses CPUs

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """It has an index, also on the CPU, because Lightning gives it to DeepSpeed, which counts with it."""
        device = super().root_device
        return device if device.index is not None else torch.device(device.type, 0)

    # -- the model and its optimizer ---------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer) -> None:
        if not isinstance(self.precision_plugin, DeepSpeedPrecision):
            raise TypeError(
                f"{type(self.precision_plugin).__name__} would bypass DeepSpeed's engine: give the Trainer a precision "
                "string, or plugins=[Int8MixedPrecision(...)]"
            )
        given, asked = self._given.get("gradient_clipping"), trainer.gradient_clip_val
        if given is not None and asked is not None and given != asked:
            raise ValueError(
                f"Trainer(gradient_clip_val={asked}) contradicts the config, whose gradient_clipping is {given}: give "
                "one of them"
            )
        super().setup(trainer)
        pass_matrices_on()

    def _auto_select_batch_size(self) -> int:
        """For DeepSpeed's throughput log alone; Lightning fails on loaders whose data set makes the batches."""
        assert self.lightning_module is not None
        source = self.lightning_module.trainer.fit_loop._data_source
        loader = source.dataloader() if source.is_defined() else None
        return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 1

    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        assert self.lightning_module is not None
        optimizer, scheduler = super()._init_optimizers()
        check_deepspeed({}, optimizer)
        adapt(optimizer, self.optimizer_bits, self._paging, NAME)
        self._groups = SplitGroups(optimizer, self.lightning_module)
        if isinstance(optimizer, optim.LowBitOptimizer):
            _vouch_for(type(optimizer))
            optimizer.check_pages(share=self.num_processes / self.world_size)  # again, now that this is known
        self._groups.extend(((self.config or {}).get("scheduler") or {}).get("params") or {})
        if scheduler is not None:
            self._groups.hide_from(scheduler.scheduler)
        return optimizer, scheduler

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by ``accumulate_grad_batches``; the engine would divide it a second time.

        Raises:
            RuntimeError: at stages 1 and 2 for a second ``manual_backward`` before a step: DeepSpeed doesn't add them.
        """
        assert self.lightning_module is not None
        self._backwards += 1
        if self._backwards > 1 and not self.lightning_module.automatic_optimization and not self.zero_stage_3:
            raise RuntimeError(
                "manual_backward was called twice before a step, and DeepSpeed's stages 1 and 2 do not add such "
                "gradients up: add the losses, or use stage 3, or automatic optimization with accumulate_grad_batches"
            )
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self._backwards = 0
        if self._groups is not None:
            self._groups.follow()
        return super().optimizer_step(*args, **kwargs)

    # -- the steps ---------------------------------------------------------------------------------------------------
    #
    # The engine ends an autocast that was begun outside of it, so the precision plugin's context goes inside.

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._in_engine("training_step", self.precision_plugin.train_step_context, *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._in_engine("validation_step", self.precision_plugin.val_step_context, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._in_engine("test_step", self.precision_plugin.test_step_context, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_engine("predict_step", self.precision_plugin.predict_step_context, *args, **kwargs)

    def _in_engine(self, name: str, context: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        assert self.model is not None

        def step(*args: Any, **kwargs: Any) -> Any:
            inner: AbstractContextManager = context()
            with inner:
                return getattr(module, name)(*args, **kwargs)

        vars(module)[STEP] = step
        try:
            return self._forward_redirection(self.model, module, STEP, *args, **kwargs)
        finally:
            del vars(module)[STEP]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # DeepSpeed writes it

    def save_checkpoint(self, checkpoint: dict, filepath: _PATH, storage_options: Any = None) -> None:
        """See Lightning's. A mark in the checkpoint lets ``python -m deepspeed.checkpoint.ds_to_universal`` convert it.
        The conversion of an older checkpoint at this path is no longer used. Raises OSError (ENOSPC) if the disk is
        full."""
        from deepspeed.checkpoint import constants

        if self.is_global_zero:
            (Path(filepath) / checkpoints.CONVERTED).unlink(missing_ok=True)
        added: dict[str, Any] = {}
        if self._groups is not None:
            added[checkpoints.OURS] = {"optimizer_bits": self.optimizer_bits, "groups": self._groups.names}
        zeros: list[Any] = self.optimizers
        if not any(checkpoints.missed_by_converter(zero.optimizer) for zero in zeros):
            mark = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
            added[constants.UNIVERSAL_CHECKPOINT_INFO] = mark
        with naming_a_full_disk(Path(filepath)):
            super().save_checkpoint({**checkpoint, **added}, filepath, storage_options)

    def load_checkpoint(  # type: ignore[override]  # Lightning 2.5 has no weights_only
        self, checkpoint_path: _PATH, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a checkpoint that was saved by the same number of ranks, or one that DeepSpeed's tool has converted.

        Raises:
            ValueError: if another number of ranks saved it and it has not been converted (the error gives the command);
                for another stage, other groups of parameters, and states that the tool does not know; for evaluation at
                stage 3 on more ranks than saved it.
        """
        assert self.lightning_module is not None
        path = Path(checkpoint_path)
        saved = checkpoints.read(path)
        if saved is not None:
            checkpoints.check_stage(path, saved, self.config["zero_optimization"]["stage"])  # type: ignore[index]
        if saved is None or not self.lightning_module.trainer.training:
            if saved is not None and self.zero_stage_3:
                self._prepare_evaluation(path, saved["dp_world_size"])
            with self._universal(False):
                return super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._groups is not None:
            checkpoints.check_groups(path, saved, self._groups.names, self._groups.split)
        same = saved["dp_world_size"] == self.world_size
        universal = not same or self.deepspeed_engine._config.load_universal_checkpoint
        if universal:
            self._check_converted(path, saved["dp_world_size"])
        with self._universal(universal):
            state = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if universal:
            self._take_universal(path)
        # Stages 1 and 2 have taken the checkpoint's clipping, whatever this Trainer was given.
        self.optimizers[0].clip_grad = self.deepspeed_engine.gradient_clipping()  # type: ignore[attr-defined]
        return state

    def _prepare_evaluation(self, path: Path, saved: int) -> None:
        if saved < self.world_size:
            raise ValueError(
                f"{path} was saved by {saved} ranks at stage 3, and DeepSpeed evaluates it on no more than that, not "
                f"on {self.world_size}: use devices={saved}, or make one file of it, by "
                "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict(FOLDER, FILE), and "
                "give that to DeepSpeedStrategy(3, load_full_weights=True)"
            )
        parameters = self.deepspeed_engine.optimizer
        if not hasattr(parameters, "_restore_from_bit16_weights"):  # 0.19.8 calls it, with nothing to restore
            parameters._restore_from_bit16_weights = lambda: None

    def _check_converted(self, path: Path, saved: int) -> None:
        missed = checkpoints.missed_by_converter(self.optimizers[0].optimizer)  # type: ignore[attr-defined]
        if missed:
            raise ValueError(
                f"{path} was saved by {saved} ranks, and DeepSpeed's converter to other numbers of ranks does not know "
                f"this optimizer's states, {missed}, but exp_avg with exp_avg_sq alone: use devices={saved} in all, "
                "without load_universal, or strategy='lowbit_sharded'"
            )
        if not (path / checkpoints.CONVERTED).is_file():
            raise ValueError(
                f"{path} was saved by {saved} ranks and this run has {self.world_size}: convert it once, by python -m "
                f"deepspeed.checkpoint.ds_to_universal --input_folder {path / checkpoints.FOLDER} "
                f"--output_folder {path / 'universal'}"
            )

    @contextmanager
    def _universal(self, wanted: bool) -> Iterator[None]:
        config = self.deepspeed_engine._config
        before = config.load_universal_checkpoint
        config.load_universal_checkpoint = wanted
        try:
            yield
        finally:
            config.load_universal_checkpoint = before

    def _take_universal(self, path: Path) -> None:
        zero: Any = self.optimizers[0]
        if self.zero_stage_3:  # all groups have got the first one's hyperparameters
            for group, theirs in zip(zero.param_groups, checkpoints.read_groups(path), strict=True):
                group.update({key: value for key, value in theirs.items() if key != "params"})
            zero._set_fp32_optimizer_param_groups()
        if isinstance(zero.optimizer, optim.LowBitOptimizer):
            zero.optimizer.form_states()  # else they take four times the memory until the next step
        if self.zero_stage_3:
            zero._clear_fp32_optimizer_param_groups()


def _vouch_for(optimizer: type[Optimizer]) -> None:
    """Add a class to those that DeepSpeed knows to work with ZeRO; it warns that other classes are untested."""
    from deepspeed.runtime.zero import utils

    if optimizer not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def _import_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{NAME} needs DeepSpeed: pip install lowbit-lightning[deepspeed] ({error})", name="deepspeed"
        ) from error
