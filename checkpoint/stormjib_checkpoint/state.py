"""A model and its torch optimizer as one flat mapping of names, and back: no pickle, no state_dict of the optimizer.

Own mapping on purpose: `get_optimizer_state_dict` takes a hidden step where the state is still empty. Names:
`model.<fqn>`, `optim.<fqn>.<key>` for the state of a parameter, `group.<i>.<key>` for the options of a group. A parameter that has no
state yet has `ABSENT` under `optim.<fqn>`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stormjib_checkpoint.agreeing import agreed
from stormjib_checkpoint.errors import StateMismatch, UnsupportedState
from stormjib_checkpoint.reader import ALONE, Checkpoint
from stormjib_checkpoint.tensors import ABSENT, DTYPES, Value

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch.optim import Optimizer

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.proof import Group
    from stormjib_checkpoint.reader import Rename
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.storage import Storage

_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Parts of names that say how a module is run (DDP, compile, activation checkpointing, FSDP) and not which it is."""
T = TypeVar("T")

_GROUP = "group."
_HOW_NOT_WHAT = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Options that say how an optimizer computes: they belong to the machine and not to the training."""


def collect(model: nn.Module, optimizer: Optimizer) -> dict[str, Value]:
    """Everything that training needs to go on, by name, without a copy. Raises UnsupportedState."""
    return _collect(model, optimizer, _parameter_names(model, optimizer), optimizer.state)


def restore(
    storage: Storage,
    resume: tuple[int, str, str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    rename: Rename | None = None,
    cast: Collection[str] = (),
    near: Near | None = None,
    group: Group = ALONE,
) -> dict[str, Json]:
    """Load a step into a model and an optimizer, also one that has never stepped; returns what `train` was.

    `rename`, `cast` and `group` are as in `reader.load`, and see the names of `collect`. State that the checkpoint lacks is taken away.
    Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch, StorageError.
    """
    with agreed(group):
        checkpoint = Checkpoint(storage, resume, rename, near)
        names = _parameter_names(model, optimizer)
        tensors, scalars = _by_owner(checkpoint.atoms), _by_owner(checkpoint.scalars)
        shaped = {}
        for parameter, name in names.items():
            owner = f"optim.{name}"
            made = _shaped(optimizer, parameter, owner, tensors.get(owner, {}))
            shaped[parameter] = {**made, **scalars.get(owner, {})}
        state = _collect(model, optimizer, names, shaped)
        _reconcile_options(state, checkpoint, rename)
    checkpoint.fill(state, cast=cast, group=group)
    _set_state(optimizer, names, shaped, state)
    return checkpoint.train


def _collect(
    model: nn.Module,
    optimizer: Optimizer,
    names: Mapping[torch.Tensor, str],
    of_parameters: Mapping[torch.Tensor, Mapping[str, Any]],
) -> dict[str, Value]:
    state: dict[str, Value] = _model_tensors(model)
    for parameter, name in names.items():
        found = of_parameters.get(parameter)
        state |= (
            {f"optim.{name}.{key}": value for key, value in found.items()}
            if found
            else {f"optim.{name}": ABSENT}
        )
    for index, group in enumerate(optimizer.param_groups):
        state[f"{_GROUP}{index}.params"] = [f"model.{names[parameter]}" for parameter in group["params"]]
        for key, value in _options(group):
            state[f"{_GROUP}{index}.{key}"] = value
    return state


def _model_tensors(model: nn.Module) -> dict[str, Value]:
    """Parameters and persistent buffers. Through `state_dict`, whose hooks make FSDP2 put its shards back first."""
    found: dict[str, Value] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        clean = f"model.{_clean(name)}"
        if not isinstance(value, torch.Tensor):
            raise UnsupportedState(
                f"{clean} is a {type(value).__name__}; keep such state in `train`, as JSON"
            )
        if clean in found:
            raise UnsupportedState(f"two tensors of the model are called {clean} once wrappers are left out")
        found[clean] = value
    return found


def _clean(name: str) -> str:
    *modules, own = name.split(".")
    return ".".join([*(module for module in modules if module not in _WRAPPERS), own])


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[torch.Tensor, str]:
    """The optimizer's parameters and their names in the model."""
    model.state_dict(keep_vars=True)  # for its hooks: see _model_tensors
    of_model: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Of several names the first in the alphabet, as the tensor itself is stored.
        of_model[id(parameter)] = min(of_model.get(id(parameter), _clean(name)), _clean(name))
    names: dict[torch.Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in of_model:
                raise UnsupportedState(
                    f"group {index} of the optimizer has a parameter of shape {list(parameter.shape)} that the "
                    "model does not have; make the optimizer after the model was sharded"
                )
            names[parameter] = of_model[id(parameter)]
    return names


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in group.items() if key not in _HOW_NOT_WHAT)


def _by_owner(table: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """`{"optim.w.exp_avg": x}` as `{"optim.w": {"exp_avg": x}}`."""
    found: dict[str, dict[str, T]] = {}
    for name, value in table.items():
        owner, _, key = name.rpartition(".")
        found.setdefault(owner, {})[key] = value
    return found


def _shaped(
    optimizer: Optimizer, parameter: torch.Tensor, owner: str, atoms: Mapping[str, IndexAtom]
) -> dict[str, torch.Tensor]:
    """The tensors to fill of a parameter's state: its own, or new ones where the optimizer has none yet."""
    present: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return {
        key: _state_tensor(optimizer, parameter, f"{owner}.{key}", atom, present.get(key))
        for key, atom in atoms.items()
    }


def _state_tensor(
    optimizer: Optimizer, parameter: torch.Tensor, name: str, atom: IndexAtom, present: object
) -> torch.Tensor:
    if isinstance(present, torch.Tensor):
        return present
    dtype = DTYPES.get(atom.dtype)
    if dtype is None:
        raise StateMismatch(f"{name} is {atom.dtype}, which this torch does not have; use a newer one")
    if atom.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and atom.shape:
        raise StateMismatch(
            f"{name} has shape {list(atom.shape)}, its sharded parameter {list(parameter.shape)}: how it is cut is not "
            "known before the optimizer has stepped once"
        )
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = atom.shape or group.get("fused") or group.get("capturable")
    return torch.zeros(atom.shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _reconcile_options(state: dict[str, Value], checkpoint: Checkpoint, rename: Rename | None) -> None:
    """Groups must hold the same parameters; options that only one side knows (another torch) stay as they are."""
    there = {**checkpoint.scalars, **checkpoint.atoms}
    for name in [name for name in state if name.startswith(_GROUP)]:
        if name not in there and not name.endswith(".params"):
            del state[name]
        elif name.endswith(".params") and state[name] != _members(there.get(name), rename):
            raise StateMismatch(
                f"{name} differs: the optimizer's groups hold other parameters than when it was saved"
            )
    for name in checkpoint.scalars.keys() - state.keys():
        if name.startswith(_GROUP):
            state[name] = None


def _members(names: Json, rename: Rename | None) -> Json:
    return [rename(name) for name in names] if rename is not None and isinstance(names, list) else names


def _set_state(
    optimizer: Optimizer,
    names: Mapping[torch.Tensor, str],
    shaped: Mapping[torch.Tensor, Mapping[str, Any]],
    state: Mapping[str, Value],
) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for key, value in list(_options(group)):
            group[key] = state.get(f"{_GROUP}{index}.{key}", value)
    for parameter, name in names.items():
        optimizer.state.pop(parameter, None)
        if shaped[parameter]:
            optimizer.state[parameter] = {key: state[f"optim.{name}.{key}"] for key in shaped[parameter]}
