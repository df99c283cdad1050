"""Copy a user's network without the wrappers that compiling, checkpointing and data parallelism put around its modules."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dit.errors import UserError

SHARDED = "gather its weights into a network that is not wrapped, and audit that"


def inside(module: nn.Module) -> nn.Module | None:
    """The module that the wrapper `module` wraps; None if it is no wrapper. Raises `UserError` for a shard of the weights."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"FullyShardedDataParallel", "FSDPModule", "FlattenParamsWrapper"}:
        raise UserError(f"{type(module).__name__} holds a shard of the weights; {SHARDED}")
    if "OptimizedModule" in kinds:  # by its name, because importing its class takes seconds
        return module.get_submodule("_orig_mod")
    if isinstance(module, DistributedDataParallel | nn.DataParallel | AveragedModel):
        return module.module
    if "ActivationWrapper" in kinds:
        return module.get_submodule("_checkpoint_wrapped_module")
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside its outermost wrappers."""
    while (inner := inside(model)) is not None:
        model = inner
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy in which every wrapper, at any depth, is replaced by the module in it.

    Raises `UserError` if no independent copy can be made: the weights are sharded, or the network calls code that is bound to
    the original.
    """
    for name, weight in model.named_parameters():
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            raise UserError(f"weight {name} is a {type(weight.data).__name__}; {SHARDED}")
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise UserError(f"weight {name} has no shape yet; call the network once before it is audited")
    memo: dict[int, Any] = {}
    try:
        for module in reversed(list(model.modules())):
            if (inner := inside(module)) is not None:
                memo[id(module)] = copy.deepcopy(inner, memo)
        network: nn.Module = copy.deepcopy(model, memo)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error
    originals = {id(module): memo[id(module)] for module in model.modules() if id(module) in memo}
    for path, module in network.named_modules():
        module._compiled_call_impl = None  # of `module.compile()`: the plain network is audited
        _unbind(path, module, originals)
    return network


def _unbind(path: str, module: nn.Module, originals: dict[int, nn.Module]) -> None:
    """Bind replaced methods to the copy. Raises `UserError` if a function or hook still refers to the original network."""
    for name, given in list(module.__dict__.items()):
        value = _plain(given)
        if inspect.ismethod(value) and id(value.__self__) in originals:
            value = types.MethodType(value.__func__, originals[id(value.__self__)])
        module.__dict__[name] = value
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for value in [*filter(callable, module.__dict__.values()), *hooks]:
        if any(id(held) in originals for held in _held(value)):
            raise UserError(
                f"the network cannot be copied: a copy of a function in {path or type(module).__name__} would still call the "
                "original network; remove what wraps the network's functions, such as activation checkpointing"
            )


def _compiled(value: Any) -> bool:
    return hasattr(value, "_torchdynamo_orig_callable")


def _plain(value: Any) -> Any:
    """The function or method that `torch.compile` was given; other values are returned as they are."""
    if not _compiled(value):
        return value
    while _compiled(value):
        value = value._torchdynamo_orig_callable
    methods = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
    return methods[0] if len(methods) == 1 and inspect.ismethod(methods[0]) else value


def _held(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The modules that a user's function refers to: as `self`, in a partial, by a weak reference, or in a closure."""
    if depth == 0:
        return
    if isinstance(value, weakref.ref):
        value = value()
        if isinstance(value, nn.Module):
            yield value
        return
    held: list[Any] = []
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        held = [value.__func__, value.__self__]
    elif inspect.isfunction(value):
        held = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    for item in held:
        if isinstance(item, nn.Module):
            yield item
        else:
            yield from _held(item, depth - 1)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def unregistered(model: nn.Module, output: Tensor) -> set[str]:
    """Shapes of the parameters that `output` is computed from and that `model` does not list."""
    known = {id(weight) for weight in model.parameters()}
    waiting, seen, found = [output.grad_fn], set(), set[str]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in known and isinstance(variable, nn.Parameter):
            found.add(" x ".join(map(str, variable.shape)) or "a number")
        waiting += [following for following, _ in node.next_functions]
    return found
