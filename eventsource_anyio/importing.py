"""Names of a package whose modules are imported when the names are asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from importlib import import_module


def imported_later(
    namespace: MutableMapping[str, object], places: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package; `places` are the names' modules in it."""
    package = str(namespace["__name__"])

    def get(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(places[name], package), name)
        return value

    def names() -> list[str]:
        return sorted({*namespace, *places})

    return get, names
