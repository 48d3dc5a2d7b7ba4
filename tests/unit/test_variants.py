"""Variants change what is planned, compiled and kept while they apply, and nothing afterwards."""

from __future__ import annotations

import json

import pytest

from benchmarks import ahead, variants
from benchmarks.variants import Change, questions
from benchmarks.workloads import select
from cuflash import dispatch
from cuflash.backends import cuda_backend
from cuflash.cuda import module, nvrtc
from cuflash.device import DeviceInfo

HOPPER = DeviceInfo.named("sm_90a")
ASKED = [(question, name) for question in questions() for name in question.variants]
asked = pytest.mark.parametrize(("question", "name"), ASKED, ids=[f"{q.name}: {name}" for q, name in ASKED])


def planned(question) -> list[tuple]:
    """Launches, each with the text of its kernel."""
    launches = ahead.steps(select(question.cells), question.passes, None, HOPPER)
    return [(step, module.translation_unit(step.spec)) for step in launches]


@asked
def test_open_questions_change_something(question, name):
    """Launches are planned otherwise, or the text of a kernel is another: an edit that does not fit asks nothing."""
    before = planned(question)
    with question.variants[name].applied({}, {}, {}):
        after = planned(question)
    assert after != before
    assert planned(question) == before


@pytest.mark.slow
@asked
def test_what_they_ask_about_compiles(question, name):
    with question.variants[name].applied({}, {}, {}):
        for spec, text in {step.spec: text for step, text in planned(question)}.items():
            report = nvrtc.compile_text(text, spec.arch, name=spec.source)
            assert report.warnings == (), "C7508 to C7515: products wait for each other"
            assert report.spill_stores == 0


def test_a_variant_keeps_its_calls_launches_and_kernels_to_itself():
    calls, launches, kernels = {}, {}, {}
    outside = dispatch._prepared, cuda_backend._launches, module._kernels
    with Change().applied(calls, launches, kernels):
        assert dispatch._prepared is calls
        assert cuda_backend._launches is launches
        assert module._kernels is kernels
    assert (dispatch._prepared, cuda_backend._launches, module._kernels) == outside


def test_edits_fit_once_or_are_refused():
    (spec,) = ahead.specs(select(["d64-full-512"]), ["fwd"], None, HOPPER)
    with pytest.raises(ValueError, match=r"the edits occur \[\d\d+\] times in forward_sm90.cu; each must occur once"):
        Change(edits=[("shared", "other")]).edited(spec)
    assert Change(edits=[("in no kernel", "")]).edited(spec) == module.translation_unit(spec)


def test_questions_are_listed_without_a_gpu(capsys, tmp_path):
    entry = {"name": "a", "prediction": "b", "cells": ["few"], "passes": ["fwd"], "variants": {"c": {}}}
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([entry, entry | {"name": "other"}]))
    assert variants.main(["--list", "--file", str(file), "--questions", "a"]) == 0
    shown = capsys.readouterr().out
    assert "a: b" in shown and "other" not in shown
