"""What the checks of ShardedStrategy share: a model of odd shapes, a trainer, and pictures of the whole state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lowbit_lightning.state.pages import Entries
from lowbit_lightning.strategies import ShardedStrategy
from support.quiet import quiet_trainer
from support.ranks import equal

TOKENS, WIDTH, BATCH = 7, 301, 12  # of all ranks together: 12 sequences


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 512)
        self.down = nn.Linear(512, WIDTH)  # 301 rows of 512

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Data(L.LightningModule):
    """The same tokens in the same order on any number of ranks."""

    steps, length = 6, 5
    optimizer: Any = None  # what configure_optimizers makes, where that is asked for

    def _data(self) -> Tensor:
        return torch.randint(0, TOKENS, (BATCH * self.steps, self.length), generator=torch.Generator().manual_seed(1))

    def _loader(self) -> DataLoader:
        data = self._data()
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler: Any = DistributedSampler(data, ranks, rank, shuffle=False)  # type: ignore  # Lightning's shuffles
        return DataLoader(TensorDataset(data), batch_size=BATCH // ranks, sampler=sampler)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Net(Data):
    """No rank count divides its rows; on three ranks one holds no row of ``pair``, two none of ``single``.

    Tied weights, a frozen layer, one parameter that gets no gradient, two groups, and a training_step that never
    calls forward.
    """

    def __init__(
        self, optimizer: Any = torch.optim.AdamW, steps: int = 6, lr: float = 1e-3, seed: int = 0, length: int = 5
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.optimizer, self.steps, self.lr, self.length = optimizer, steps, lr, length
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.layers = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.convolution = nn.Conv2d(16, 33, 3)
        self.small = nn.Linear(77, 5)
        self.pair = nn.Parameter(torch.randn(2, 400))
        self.single = nn.Parameter(torch.randn(1, 400))
        self.unused = nn.Parameter(torch.randn(64, 70))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))
        self.losses: list[Tensor] = []

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + 0.1 * self.frozen(x)
        for layer in self.layers:
            x = layer(x)
        image = x[..., :256].unflatten(-1, (16, 16)).flatten(0, 1).unsqueeze(-1).expand(-1, -1, -1, 9)
        extra = self.small(torch.relu(self.convolution(image)).flatten(1)[:, :77]).unflatten(0, tokens.shape)
        scale = 1 + self.pair.mean() + self.single.mean()
        return self.head(self.norm(x)) * scale + nn.functional.pad(extra, (0, TOKENS - 5))

    def loss(self, batch: Any) -> Tensor:
        (tokens,) = batch
        logits = self.logits(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.count.add_(1)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.logits(batch[0]).argmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        return self.optimizer(groups, lr=self.lr)

    def mean_losses(self) -> list[float]:
        """Of all ranks; a collective."""
        losses = torch.stack(self.losses)
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        return losses.tolist()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def trainer(strategy: Any = None, **options: Any) -> L.Trainer:
    """Over all ranks there are; ShardedStrategy unless something else is asked for."""
    if strategy is None:
        strategy = ShardedStrategy()
    fixed: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": 0, "use_distributed_sampler": False}
    return quiet_trainer(devices=world(), strategy=strategy, **{**fixed, **options})


class Traffic(TorchDispatchMode):
    """Collectives of this rank while it is entered: how often, and the bytes of the larger side, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._opname.strip("_").split("_tensor_")[0]
            sides = [tree_leaves(x) for x in args[:2] if not isinstance(x, (str, int))]
            size = max(sum(x.nbytes for x in side if isinstance(x, Tensor)) for side in sides)
            self.calls[name] += 1
            self.bytes[name] += size
        return function(*args, **(kwargs or {}))


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def picture(model: nn.Module, optimizers: Any) -> dict[str, dict[str, Tensor]]:
    """All weights, buffers and states, whole, by name; a collective."""
    owners = {p: name for name, p in model.named_parameters()}
    result = {"": {name: whole(x) for name, x in model.state_dict().items()}}
    for i, optimizer in enumerate(optimizers):
        for p, entries in optimizer.state.items():
            named = entries.named() if isinstance(entries, Entries) else entries
            if named:
                result[f"{i} {owners[p]}"] = {k: whole(torch.as_tensor(x)) for k, x in named.items()}
    return result


def raised(action: Any, kind: type[BaseException], *words: str) -> str | None:
    """What is wrong with the error that an action raises."""
    try:
        action()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        return f"{missing} are not in: {error}" if missing else None
    return f"no {kind.__name__}"


class Looker(L.Callback):
    picture: Any = None

    def on_train_start(self, trainer: L.Trainer, model: Any) -> None:
        self.picture = picture(model, trainer.optimizers)


def round_trip(path: Path, model: Net, made: L.Trainer, make: Callable[[], Any]) -> str | None:
    made.save_checkpoint(path)
    looker = Looker()
    before = picture(model, made.optimizers)
    again = trainer(make(), callbacks=[looker], max_epochs=2)
    again.fit(Net(steps=model.steps, seed=5), ckpt_path=path)
    return equal(looker.picture, before)
