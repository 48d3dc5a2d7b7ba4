"""Kernels of the selected tests are compiled side by side before the first of them runs."""

from __future__ import annotations

from contextlib import suppress

import pytest

from emulated import twin


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    """Calls the module's ``sources_of`` with the parameters of each selected test.

    What goes wrong here goes wrong again in the test itself, which then says so.
    """
    sources_of = getattr(request.module, "sources_of", None)
    if sources_of is None or hasattr(request.config, "workerinput"):  # pytest-xdist's workers are parallel already
        return
    selected = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    jobs = []
    for item in selected:
        with suppress(Exception):
            jobs += sources_of(**item.callspec.params)
    twin.compile_ahead(jobs)
