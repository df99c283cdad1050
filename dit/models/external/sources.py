"""Finds external code by its name: a class of diffusers, or a function in a module of the user."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from dit.errors import ConfigError, UserError
from dit.models.external.network import Made

Maker = Callable[[], Made]


def diffusers_class(name: str) -> type[nn.Module]:
    """The class of diffusers called `name`. Raises `ConfigError` if diffusers has no network of this name."""
    import diffusers

    found = getattr(diffusers, name, None) if name and not name.startswith("_") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        known = ", ".join(sorted(each for each in diffusers.__all__ if "Transformer" in each and each.endswith("Model")))
        raise ConfigError(f"diffusers has no network '{name}'; expected one such as {known}")
    return found


def built(constructor: Callable[..., nn.Module], arguments: Mapping[str, Any], where: str) -> nn.Module:
    """Call `constructor` with `arguments`. Raises `ConfigError` that shows them, and says `where` the user gives them."""
    try:
        return constructor(**arguments)
    except Exception as error:
        shown = json.dumps(arguments, default=str)
        raise ConfigError(
            f"{constructor.__name__} cannot be built: {type(error).__name__}: {error}; give the arguments that it needs with "
            f"{where}; it was given {shown}"
        ) from None


@contextmanager
def working_directory_searched() -> Iterator[None]:
    """Within the block, modules are also imported from the working directory."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def imported(module: str) -> ModuleType:
    """Import a module. Raises `ConfigError` if it does not exist; if an import inside it fails, that error is raised."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"'{module}': {error}; expected a module that Python can import from here") from None
        raise


def function(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module. Raises `ConfigError` if the module has no such function."""
    found = getattr(imported(module), name, None)
    if not callable(found):
        raise ConfigError(f"'{module}:{name}': {module} has no function '{name}'")
    return found


def maker(module: str, name: str, arguments: Mapping[str, Any], sizes: Mapping[str, Any]) -> Maker:
    """A function that calls the function `name` of `module` with `arguments`, and with those `sizes` that it has arguments for.

    Raises `ConfigError` for arguments that the function does not take, or that follow from the study.
    """
    where = f"{module}:{name}"
    try:
        with working_directory_searched():
            factory = function(module, name)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"'{where}' cannot be imported: {type(error).__name__}: {error}") from error
    parameters = inspect.signature(factory).parameters
    follows = {key: value for key, value in sizes.items() if key in parameters}
    check_arguments(where, factory, arguments, follows)
    return partial(_made, where, factory, {**follows, **arguments})


def check_arguments(where: str, factory: Callable[..., Any], arguments: Mapping[str, Any], follows: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `factory` takes `arguments` together with `follows`, which follow from the study."""
    if twice := sorted(arguments.keys() & follows.keys()):
        raise ConfigError(f"model.arguments of {where}: {twice[0]} follows from the study ({follows[twice[0]]}); leave it out")
    try:
        inspect.signature(factory).bind(**follows, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.arguments of {where}: {error}; its signature is {inspect.signature(factory)}, "
            f"and the study gives {', '.join(follows) or 'none of it'}"
        ) from None


def _made(where: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Made:
    with working_directory_searched():
        try:
            network = factory(**arguments)
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(f"'{where}' raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"'{where}' returned {type(network).__name__}; expected a torch.nn.Module that is called as (x, t, y)"
        )
    return network, None
