"""What ran on a GPU: benchmarks/results/gpu_tests.json, merged over the parts of one and the same code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks import record

PATH = record.RESULTS / "gpu_tests.json"
SAME_RECORD = ("source_hash", "gpu", "driver", "nvrtc")


def merged(old: dict, environment: dict, section: str, entries: dict) -> dict:
    """The record with ``entries`` added to a section; a record of other code or another machine is begun anew."""
    if any(old.get(name) != environment[name] for name in SAME_RECORD):
        old = {}
    sections = {name: value for name, value in old.items() if isinstance(value, dict) and name != "counts"}
    sections[section] = dict(sorted({**sections.get(section, {}), **entries}.items()))
    counts = Counter(entry["outcome"] for name in sections for entry in sections[name].values())
    return {**environment, "counts": dict(sorted(counts.items())), **sections}


def add(section: str, entries: dict, path: Path = PATH) -> None:
    """Merge ``entries`` ({name: {"outcome": ..., ...}}) into the record on disk."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged(old, record.environment(), section, entries), indent=1) + "\n")
