"""Which parts of a model FSDP2 gathers as one, and which part of it a rank holds. Strategies and planner ask here.

FSDP2 cuts every parameter along dimension 0, as ``torch.chunk`` does: of ``rows`` rows on ``n`` ranks the first ranks
get ``ceil(rows / n)`` each, the last ones what remains, which may be nothing. What travels is padded to equal shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import prod

from torch import Tensor, nn

Policy = Callable[[str, nn.Module], bool]
Shape = tuple[int, ...]

SHORTEST_INT8_ROW = 16
_ALIGNMENT = 16  # of the scales after the codes, in bytes
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_blocks(module: nn.Module) -> list[str]:
    """The names of a model's repeated blocks: the outermost modules that have children and parameters, and stand in a
    ``ModuleList``, ``ModuleDict`` or ``Sequential`` beside another of their class."""
    found: list[str] = []
    for name, container in module.named_modules():
        if not isinstance(container, _CONTAINERS) or any(name.startswith(f"{block}.") for block in found):
            continue
        kinds = Counter(type(child) for child in container.children())
        for child_name, child in container.named_children():
            if kinds[type(child)] > 1 and any(child.children()) and any(True for _ in child.parameters()):
                found.append(f"{name}.{child_name}" if name else child_name)
    return found


def chosen_blocks(module: nn.Module, policy: Policy | None) -> list[str]:
    """The modules that the policy chooses, or the repeated blocks; innermost first, as they are sharded.

    Modules that share a parameter with something outside of them are left to the root.
    """
    if policy is None:
        names = repeated_blocks(module)
    else:
        names = [name for name, child in module.named_modules() if name and policy(name, child)]
        if not names:
            raise ValueError(
                "policy chose no module to shard; it is asked policy(name, module) for each of the model's "
                f"{sum(1 for _ in module.modules())} modules, by names as in model.named_modules()"
            )
    owners: dict[Tensor, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        owners.setdefault(p, []).append(name)
    shared = [users for users in owners.values() if len(users) > 1]

    def stands_alone(block: str) -> bool:
        inside = ([user.startswith(f"{block}.") for user in users] for users in shared)
        return all(all(users) or not any(users) for users in inside)

    return sorted(filter(stands_alone, names), key=lambda name: -name.count("."))


def grouped(module: nn.Module, blocks: Iterable[str]) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters of each block, without those of blocks inside of it, and what is left for the root."""
    taken: set[nn.Parameter] = set()

    def take(part: nn.Module) -> list[nn.Parameter]:
        own = [p for p in part.parameters() if p not in taken]
        taken.update(own)
        return own

    groups = [take(module.get_submodule(name)) for name in blocks]
    return [group for group in groups if group], take(module)


def mesh_shape(world_size: int, replicas: int) -> tuple[int, int]:
    """The replicas of a model, and the ranks that share out one of them: FSDP2's mesh (HSDP with several replicas).

    Raises:
        ValueError: for replicas that do not divide the ranks.
    """
    if world_size % replicas:
        raise ValueError(f"replicas must divide the number of ranks, {world_size}; got {replicas}")
    return replicas, world_size // replicas


def first_share(shape: Shape, ranks: int) -> Shape:
    """The shape of the first rank's part, which is the largest."""
    if ranks == 1 or not shape:
        return shape
    return -(-shape[0] // ranks), *shape[1:]


def padded(shape: Shape, ranks: int) -> int:
    """The elements that travel: those of equal shares."""
    return ranks * prod(first_share(shape, ranks))


def travels_in_int8(shape: Shape) -> bool:
    """Whether ``all_gather="int8"`` quantises a parameter: a matrix whose rows are long enough for a scale each."""
    return len(shape) >= 2 and prod(shape[1:]) >= SHORTEST_INT8_ROW


def int8_share(rows: int, length: int) -> tuple[int, int]:
    """For a rank's rows, packed as ``strategies.gather`` does: the byte at which the scales begin, after the codes, and
    the number of all bytes."""
    scales_at = -(-rows * length // _ALIGNMENT) * _ALIGNMENT
    return scales_at, scales_at + 4 * rows
