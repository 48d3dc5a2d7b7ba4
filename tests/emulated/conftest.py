"""Kernels of the selected tests are compiled side by side before the first of them runs."""

from __future__ import annotations

import pytest

from emulated import twin


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    """Calls the module's ``sources_of`` with the parameters of each selected test."""
    sources_of = getattr(request.module, "sources_of", None)
    if sources_of is None or hasattr(request.config, "workerinput"):  # pytest-xdist's workers are parallel already
        return
    selected = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    twin.compile_ahead(job for item in selected for job in sources_of(**item.callspec.params))
