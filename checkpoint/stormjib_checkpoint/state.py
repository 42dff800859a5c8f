"""A model and its torch optimizer as one flat mapping of names, and back: no pickle, no state_dict of the optimizer.

Own mapping on purpose: `get_optimizer_state_dict` takes a hidden step where the state is still empty. Names:
`model.<fqn>`, `optim.<fqn>.<key>` for the state of a parameter, `group.<i>.<key>` for the options of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stormjib_checkpoint.errors import StateMismatch, UnsupportedState
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.tensors import DTYPES, Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

    from torch.optim import Optimizer

    from stormjib_checkpoint.format import Atom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.storage import Storage

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_GROUP = "group."
_HOW_NOT_WHAT = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Options that say how an optimizer computes: they belong to the machine and not to the training."""


def collect(model: nn.Module, optimizer: Optimizer) -> dict[str, Value]:
    """Everything that training needs to go on, by name, without a copy. Raises UnsupportedState."""
    state: dict[str, Value] = _model_tensors(model)
    names = _parameter_names(model, optimizer)
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optim.{name}.{key}"] = value
    for index, group in enumerate(optimizer.param_groups):
        state[f"{_GROUP}{index}.params"] = [names[parameter] for parameter in group["params"]]
        for key, value in _options(group):
            state[f"{_GROUP}{index}.{key}"] = list(value) if isinstance(value, tuple) else value
    return state


def restore(
    storage: Storage,
    resume: tuple[int, str, str],
    model: nn.Module,
    optimizer: Optimizer,
    near: Near | None = None,
) -> dict[str, Json]:
    """Load a step into a model and an optimizer, also one that has never stepped; returns what `train` was.

    Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch, StorageError.
    """
    checkpoint = Checkpoint(storage, resume, near)
    names = _parameter_names(model, optimizer)
    for parameter, name in names.items():
        _shape_state(optimizer, parameter, f"optim.{name}.", checkpoint)
    state = collect(model, optimizer)
    _reconcile_options(state, checkpoint)
    checkpoint.fill(state)
    _set_scalars(optimizer, names, state)
    return checkpoint.train


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
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")  # DistributedDataParallel


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[torch.Tensor, str]:
    """The optimizer's parameters and their names in the model."""
    model.state_dict(keep_vars=True)  # for its hooks: see _model_tensors
    of_model = {id(parameter): _clean(name) for name, parameter in model.named_parameters()}
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


def _shape_state(optimizer: Optimizer, parameter: torch.Tensor, prefix: str, checkpoint: Checkpoint) -> None:
    """Give a parameter the state tensors that the checkpoint has for it, and take away those that it lacks."""
    wanted = {key: atom for key, atom in _below(prefix, checkpoint.atoms)}
    scalars = {key: value for key, value in _below(prefix, checkpoint.scalars)}
    present: MutableMapping[str, Any] = optimizer.state.get(parameter, {})
    shaped = {
        key: _state_tensor(optimizer, parameter, prefix + key, atom, present.get(key))
        for key, atom in wanted.items()
    }
    if shaped or scalars or present:
        optimizer.state[parameter] = {**shaped, **scalars}


def _below(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = name.removeprefix(prefix)
        if key != name and "." not in key:
            yield key, value


def _state_tensor(
    optimizer: Optimizer, parameter: torch.Tensor, name: str, atom: Atom, present: object
) -> torch.Tensor:
    if isinstance(present, torch.Tensor):
        return present
    dtype = DTYPES[atom.dtype]
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


def _reconcile_options(state: dict[str, Value], checkpoint: Checkpoint) -> None:
    """Groups must hold the same parameters; options that only one side knows (another torch) stay as they are."""
    there = {**checkpoint.scalars, **checkpoint.atoms}
    for name in [name for name in state if name.startswith(_GROUP)]:
        if name not in there and not name.endswith(".params"):
            del state[name]
        elif name.endswith(".params") and state[name] != there.get(name):
            raise StateMismatch(
                f"{name} differs: the optimizer's groups hold other parameters than when it was saved"
            )
    for name in checkpoint.scalars.keys() - state.keys():
        if name.startswith(_GROUP):
            state[name] = None


def _set_scalars(optimizer: Optimizer, names: Mapping[torch.Tensor, str], state: Mapping[str, Value]) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for key, value in list(_options(group)):
            new = state.get(f"{_GROUP}{index}.{key}", value)
            group[key] = tuple(new) if isinstance(value, tuple) else new
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            optimizer.state[parameter][key] = (
                state[f"optim.{name}.{key}"] if not isinstance(value, torch.Tensor) else value
            )
