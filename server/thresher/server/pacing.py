"""Hyper-parameters where each push is a round: what is meant to decay once for all members decays a little per push."""

from collections.abc import Sequence
from typing import cast

from thresher.protos.optimizers import Hyperparameters, OptimizerSpec, Override


def per_push(overrides: Sequence[Override], spec: OptimizerSpec, members: int) -> tuple[Override, ...]:
    """Return the hyper-parameters of a round that is one of N pushes, as differences from the registered ones.

    A momentum β becomes β^(1/N), so that N pushes decay by β. The rate is multiplied by (1 - β^(1/N)) / (1 - β): a
    gradient g/N moves the parameters by lr·g/N·(1 + β + β² + …) in the end, and that stays lr·g/(N·(1 - β)), with
    dampening and with Nesterov's momentum too. Adam's betas and RMSprop's alpha become β^(1/N) as well; they weigh
    averages, whose weights add up to 1 for any β, and Adam's correction of the bias after t pushes is then that of t/N
    rounds, so no rate changes for them. A momentum of 1 or more never decays, and is left alone.

    Law: with one member nothing changes, bit for bit.

    Args:
        overrides: As the push has them.
        spec: The optimizer as it was registered.
        members: N, at least 1.

    Examples:
        >>> sgd = OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.25},))
        >>> [(one.name, round(one.value, 4)) for one in per_push((), sgd, members=2)]
        [('lr', 0.0667), ('momentum', 0.5)]
    """
    groups = [dict(group) for group in spec.groups]
    for one in overrides:
        groups[one.group][one.name] = one.value
    return spec.overrides([_slowed(group, members) for group in groups])


def _slowed(group: Hyperparameters, members: int) -> Hyperparameters:
    slowed = dict(group)
    if "alpha" in group:
        slowed["alpha"] = _root(cast("float", group["alpha"]), members)
    if "betas" in group:
        slowed["betas"] = tuple(_root(beta, members) for beta in cast("tuple[float, ...]", group["betas"]))
    momentum = cast("float", group.get("momentum", 0.0))
    if 0.0 < momentum < 1.0:
        slowed["momentum"] = _root(momentum, members)
        slowed["lr"] = cast("float", group["lr"]) * ((1.0 - _root(momentum, members)) / (1.0 - momentum))
    return slowed


def _root(decay: float, members: int) -> float:
    root: float = decay ** (1.0 / members)
    return root
