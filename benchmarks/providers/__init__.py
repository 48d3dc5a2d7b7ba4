"""Every library that is measured, by its name in the tables. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.providers import jax_libraries, pytorch
from benchmarks.providers.base import Bound, Provider, Unavailable, reason
from benchmarks.providers.ours import Cuflash, CuflashNumpy

__all__ = ["PROVIDERS", "Bound", "Provider", "Unavailable", "available", "reason"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Cuflash(),
        Cuflash("cuflash_sm80", backend="sm80"),
        *pytorch.PROVIDERS,
        *jax_libraries.PROVIDERS,
        CuflashNumpy(),
    )
}


def available(names: Iterable[str]) -> tuple[list[Provider], dict[str, str]]:
    """The providers that load, in order, and for every other one the reason why it does not."""
    loaded, absent = [], {}
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"no provider is named {name!r}; there are {', '.join(PROVIDERS)}")
        try:
            PROVIDERS[name].load()
            loaded.append(PROVIDERS[name])
        except Exception as error:  # Unavailable says why; anything else is a library that is broken here
            absent[name] = str(error) if isinstance(error, Unavailable) else reason(error)
    return loaded, absent
