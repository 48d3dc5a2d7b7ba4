"""Which tests run where: tests of a CUDA device only with one, the full matrix only on request, and a line says so."""

from __future__ import annotations

import os

import pytest

# Before NumPy is imported: threads of one small matrix product, on cores that other test workers use, mostly wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before JAX is: it would take three quarters of a GPU that test workers share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _why_no_device() -> str | None:
    """Why there is no CUDA device to test on, or None where there is one."""
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except Exception as error:  # a missing package, driver or library: each has its own exception
        return f"no CUDA device ({error})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if any("gpu" in item.keywords for item in items):
        reasons["gpu"] = _why_no_device()
    if "full" not in config.option.markexpr:
        reasons["full"] = "only with -m full"
    config.stash[_DESELECTED] = []
    for marker, reason in reasons.items():
        left_out = [item for item in items if marker in item.keywords] if reason else []
        if left_out:
            items[:] = [item for item in items if marker not in item.keywords]
            config.hook.pytest_deselected(items=left_out)
            config.stash[_DESELECTED].append(f"{len(left_out)} tests marked {marker} left out: {reason}")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With ``-n`` and no word about ``--dist``, who is done early takes tests from others: a quarter of the time."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_DESELECTED, []):
        terminalreporter.write_line(line)


_DESELECTED: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # under pytest-xdist workers collect and only the controller prints
        session.config.workeroutput["deselected"] = session.config.stash.get(_DESELECTED, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    node.config.stash[_DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", [])
