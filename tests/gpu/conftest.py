"""Records what the tests marked gpu did, wherever a GPU ran them."""

from __future__ import annotations

import pytest
from gpu import gpu_record

from benchmarks import record


class Recorder:
    """Collects outcomes; one test counts once, by its worst phase."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" not in report.keywords:
            return
        entry = self.entries.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.skipped:
            entry |= {"outcome": "skipped", "reason": report.longrepr[2] if report.longrepr else ""}
        if report.failed:
            entry |= {"outcome": "failed", "reason": f"{report.when}: {report.longreprtext.strip().splitlines()[-1]}"}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.entries and record.gpu_name():
            gpu_record.add("tests", self.entries)


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist, whose controller hears every report
    if not is_worker and not config.pluginmanager.has_plugin("gpu-record"):
        config.pluginmanager.register(Recorder(), "gpu-record")
