"""Where somebody else's network keeps its blocks: lists of modules that are alike, and those that pass a stream on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists, and dictionaries, of layers that are themselves made of layers: where blocks are kept, in nearly every network."""
    for path, module in model.named_modules():
        elements = list(module.children()) if isinstance(module, CONTAINERS) else []
        if elements and all(type(item) is type(elements[0]) for item in elements) and any(elements[0].children()):
            yield path, module


def outermost(model: nn.Module) -> dict[str, int]:
    """The path of every block that lies in no other, and its place in its list, in the order of the network."""
    found: dict[str, int] = {}
    for path, module in containers(model):
        if not any(path.startswith(f"{block}.") for block in found):
            found |= {f"{path}.{name}".lstrip("."): index for index, (name, _) in enumerate(module.named_children())}
    return found


def stream_blocks(model: nn.Module, call: Callable[[], object]) -> tuple[str, ...]:
    """The outermost blocks whose first argument and output have one shape when `call` runs the network, in the order called.

    A list is left out if any of its modules is not a block, as where a U-Net changes its resolution.
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
