"""Finds the blocks of an external network: in lists of modules of one class, the modules that keep the shape of their input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists and dictionaries of modules that have one class and contain modules; nearly all networks keep blocks there."""
    for path, module in model.named_modules():
        elements = list(module.children()) if isinstance(module, CONTAINERS) else []
        if elements and all(type(item) is type(elements[0]) for item in elements) and any(elements[0].children()):
            yield path, module


def outermost(model: nn.Module) -> dict[str, int]:
    """By path of every block that is not inside another block, its index in its list; in the order of the network."""
    found: dict[str, int] = {}
    for path, module in containers(model):
        if not any(path.startswith(f"{block}.") for block in found):
            found |= {f"{path}.{name}".lstrip("."): index for index, (name, _) in enumerate(module.named_children())}
    return found


def stream_blocks(model: nn.Module, call: Callable[[], object]) -> tuple[str, ...]:
    """The outermost blocks whose first argument and output have the same shape when `call` runs the network, in call order.

    A list is left out if any of its modules does not keep the shape, such as a module of a U-Net that changes the resolution.
    """
    seen: list[str] = []
    modules = dict(model.named_modules())

    def watch(path: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(_: nn.Module, inputs: tuple, output: object) -> None:
            stream = inputs[0] if inputs else None
            if isinstance(stream, Tensor) and isinstance(output, Tensor) and stream.shape == output.shape:
                seen.append(path)

        return hook

    possible = outermost(model)
    hooks = [modules[path].register_forward_hook(watch(path)) for path in possible]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    broken = {path.rpartition(".")[0] for path in possible.keys() - set(seen)}
    return tuple(path for path in dict.fromkeys(seen) if path.rpartition(".")[0] not in broken)
