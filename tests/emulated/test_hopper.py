"""The Hopper kernels on the host twin: every element against the oracle, with copies and products at any moment."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest

from cases import IN_CLUSTERS, Case, poison_unused, select
from cuflash.dropout import keep_mask
from cuflash.testing import Arrays, check
from emulated.emulation import Emulation, Schedule, backward, forward, problem_of
from emulated.test_backward import operands
from emulated.test_forward import BY_ID

SEEDS = range(6)

# What every run of the tests takes: each row of tiles, each feature, each edge of lengths and head dimensions.
QUICK_FORWARD = """
    length-1 length-65 length-203 length-129x63-causal length-511x2-causal-top-left
    head-dim-16-16-float16 head-dim-40-40-bfloat16 head-dim-80-80-bfloat16
    head-dim-128-128-float16 head-dim-192-128-bfloat16 head-dim-192-192-float16
    head-dim-256-256-float16 head-dim-64-256-bfloat16 heads-6-2 heads-8-1
    few-queries-1x203-8-1-64 few-queries-17x143-8-2-128 few-queries-130x203-8-1-64 few-queries-9x203-24-2-192
    few-queries-richest
    window-5-0-65x203 window--1-3-203x65 window-top-left-empty-tail
    softcap-float16 alibi-float16 sinks dropout-float16 window+alibi
    softmax-scale-negative alibi-batch empty-rows-sinks strides-transposed-64 strides-sliced-40
    causal+used sinks+used used-zero used-k-tile-edges used-q-tile-edges richest-64-bfloat16 richest-256-bfloat16
""".split()
QUICK_BACKWARD = """
    length-1 length-65 length-203x113-full length-129x63-causal
    head-dim-40-40-bfloat16 head-dim-128-128-float16 head-dim-80-80-bfloat16
    heads-6-2 window-5-0-65x203 window--1-3-203x65 window-top-left-empty-tail
    softcap-float16 dropout-float16 softcap+dropout
    alibi-float16 sinks+dlse softmax-scale-negative empty-rows-sinks deterministic strides-transposed-64
    head-dim-192-128-bfloat16 head-dim-128-192-float16 head-dim-160-160-bfloat16 head-dim-256-256-float16
    length-65-wide length-129x63-causal-wide heads-6-2-wide softcap+dropout-wide empty-rows-sinks-wide
    length-65-repeatable heads-6-2-repeatable softcap+dropout-repeatable window-top-left-empty-tail-repeatable
""".split()

# Sequences that end inside a block, at its end, before its first row, and where the array does. Causal, some warpgroups
# need the last block and others let it pass by.
_USED = {"batch": 5, "seqlen_k": 333, "seqused_q": (150, 101, 203, 0, 9), "seqused_k": (150, 256, 0, 140, 333)}
# One of each row of tiles, with more tiles than blocks; the features that change the inner loop among them.
FORWARD_ROWS = {
    "two consumers in turn": Case("64", seqlen_q=203, seqlen_k=333, num_heads=6, causal=True),
    "three consumers in turn": Case("64-full", seqlen_q=333, seqlen_k=450),
    "own output staging": Case("128", seqlen_q=203, seqlen_k=333, head_dim=128, window_size=(150, 40), dropout_p=0.2),
    "shared output staging": Case("192", seqlen_q=203, seqlen_k=333, head_dim=192, head_dim_v=128, causal=True),
    "tiles without keys": Case("empty", seqlen_q=403, seqlen_k=80, head_dim=192, window_size=(9, 0), causal="top_left"),
    "padded, three consumers": Case("used", **_USED, seqlen_q=333, causal=True),
    "padded, two consumers": Case("used-holes", **_USED, seqlen_q=203, causal=True, dropout_p=0.2, sinks=True),
    "padded, own output staging": Case("used-128", **_USED, seqlen_q=203, head_dim=128, window_size=(150, 40)),
    "padded, shared output staging": Case("used-192", **_USED, seqlen_q=203, head_dim=192, head_dim_v=128),
    "padded, lazy rescaling": Case("used-256", **_USED, seqlen_q=203, head_dim=256, causal=True, alibi="head"),
    "packed heads": Case("packed", batch=3, seqlen_q=20, seqlen_k=333, num_heads=16, num_kv_heads=2, alibi="batch"),
    "packed heads of several blocks": Case(
        "packed-blocks", seqlen_q=130, seqlen_k=333, num_heads=8, num_kv_heads=1, head_dim=128, causal=True
    ),
    "lazy rescaling": Case("256", seqlen_q=203, seqlen_k=333, head_dim=256, softcap=3.0, alibi="head"),
}
BACKWARD_ROWS = {
    "dq of 64 columns": Case("64", seqlen_q=333, seqlen_k=333, num_kv_heads=1, causal=True, deterministic=True),
    "dq of 128 columns": Case("128", seqlen_q=203, seqlen_k=333, head_dim=128, alibi="head", deterministic=True),
    "dq with holes": Case(
        "holes", seqlen_q=203, seqlen_k=203, causal=True, softcap=2.0, dropout_p=0.2, deterministic=True
    ),
    "dk apart from dv": Case("192", seqlen_q=203, seqlen_k=333, head_dim=192, head_dim_v=128, dropout_p=0.2),
    "dv apart from dk": Case("128x192", seqlen_q=203, seqlen_k=203, head_dim=128, head_dim_v=192, causal=True),
    "one stage of v": Case("256", seqlen_q=203, seqlen_k=333, head_dim=256, num_kv_heads=1, window_size=(150, 40)),
    "two stages of v": Case(
        "capped", seqlen_q=203, seqlen_k=203, head_dim=256, softcap=3.0, alibi="head", dropout_p=0.1
    ),
}
# What the backward does to scores and dP, in every order in which it does it: cut tiles, groups of heads, each dtype.
_SCORES = {
    "dropout": {"dropout_p": 0.2},
    "softcap": {"softcap": 2.0},
    "softcap+dropout": {"softcap": 2.0, "dropout_p": 0.2},
}
_MASKS = {"causal": {"causal": True}, "window": {"window_size": (150, 20)}, "full": {}}
BACKWARD_SCORES = [
    Case(
        f"{name}-{mask}-{head_dim}",
        seqlen_q=203,
        seqlen_k=333,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        alibi="head" if (row + column) % 2 else False,
        dtype=("bfloat16", "float16")[(row + column + head_dim // 32) % 2],
        **scores,
        **_MASKS[mask],
    )
    for row, (name, scores) in enumerate(_SCORES.items())
    for column, (mask, head_dim) in enumerate(zip(_MASKS, (64, 96, 128), strict=True))
]


def emulation_of(case: Case) -> Emulation:
    """Spread schedules and sizes of the device over the cases, the same ones in every run."""
    number = zlib.crc32(case.id.encode())
    return Emulation("sm_90a", sm_count=2 + number % 4, schedule=Schedule(number, resident_blocks=1 + number // 4 % 4))


WIDE = [(256, None), (192, 128), (192, None), (256, 64), (224, None)]


def in_two_kernels() -> list[Case]:
    """Masks, features and lengths of head_dim 64 again, where dq has a kernel of its own."""
    cases = []
    for case, (head_dim, head_dim_v) in zip(select(), itertools.cycle(WIDE)):
        # Of a single key dq and dk are 0; what is left of them is noise that grows with head_dim.
        if case.head_dim == 64 and case.head_dim_v in (None, 64) and case.seqlen_k > 1:
            cases.append(replace(case, id=f"{case.id}-wide", head_dim=head_dim, head_dim_v=head_dim_v))
        if not case.deterministic and max(case.head_dim, case.head_dim_v or 0) <= 128:
            cases.append(replace(case, id=f"{case.id}-repeatable", deterministic=True))
    return cases


def on_hopper(pass_: str) -> list[Case]:
    """The cases that the plan gives to the Hopper kernel of a pass."""
    cases = []
    for case in select() + (in_two_kernels() if pass_ == "backward" else []):
        problem = case.problem() if case.strides == "contiguous" else problem_of(case.problem(), case.arrays())
        if getattr(emulation_of(case), f"plan_{pass_}")(problem).main_entry.endswith("sm90"):
            cases.append(case)
    return cases


def parameters(pass_: str, quick: list[str]) -> list:
    return [
        pytest.param(pass_, case, id=f"{pass_}-{case.id}", marks=[] if case.id in quick else pytest.mark.slow)
        for case in on_hopper(pass_)
    ]


def sources_of(
    pass_: str = "backward", case: Case | None = None, row: str = "", **others: object
) -> list[tuple[str, tuple[str, ...]]]:
    if row:
        pass_, case = row_of(row)
    if case is None:
        return []
    emulation = emulation_of(case)
    return emulation.sources(getattr(emulation, f"plan_{pass_}")(problem_of(case.problem(), case.arrays())))


def row_of(row: str) -> tuple[str, Case]:
    return ("forward", FORWARD_ROWS[row]) if row in FORWARD_ROWS else ("backward", BACKWARD_ROWS[row])


def run(pass_: str, case: Case, emulation: Emulation) -> dict[str, np.ndarray]:
    if pass_ == "backward":
        return backward(*operands(case), emulation)
    arrays = arrays_of(case)
    return forward(problem_of(case.problem(), arrays), arrays, emulation)


def arrays_of(case: Case) -> Arrays:
    """Operands in which only what takes part is finite."""
    arrays = case.arrays()
    poison_unused(arrays, (np.nan, np.inf)[zlib.crc32(case.id.encode()) % 2])
    return arrays


@pytest.mark.parametrize(
    ("pass_", "case"), parameters("forward", QUICK_FORWARD) + parameters("backward", QUICK_BACKWARD)
)
def test_case(pass_: str, case: Case) -> None:
    arrays = case.arrays()
    report = check(run(pass_, case, emulation_of(case)), problem_of(case.problem(), arrays), arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[] if case.id.startswith("softcap+dropout") else pytest.mark.slow)
        for case in BACKWARD_SCORES
    ],
)
def test_scores_of_the_backward(case: Case) -> None:
    arrays = case.arrays()
    report = check(run("backward", case, emulation_of(case)), problem_of(case.problem(), arrays), arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(("pass_", "quick"), [("forward", QUICK_FORWARD), ("backward", QUICK_BACKWARD)])
def test_quick_cases_exist(pass_: str, quick: list[str]) -> None:
    assert set(quick) <= {case.id for case in on_hopper(pass_)}


# Large tiles, and every schedule of each.
SLOW_ROWS = ("dk apart from dv", "dv apart from dk", "one stage of v", "two stages of v")


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow if row in SLOW_ROWS else []) for row in FORWARD_ROWS | BACKWARD_ROWS],
)
def test_same_bits_under_every_schedule(row: str) -> None:
    pass_, case = row_of(row)
    results = []
    for seed in SEEDS:
        emulation = Emulation("sm_90a", sm_count=1 + seed, schedule=Schedule(seed, resident_blocks=1 + seed))
        results.append(run(pass_, case, emulation))
    arrays = case.arrays()
    report = check(results[0], problem_of(case.problem(), arrays), arrays)
    assert report.ok, f"\n{report}"
    assert all(result[key].tobytes() == results[0][key].tobytes() for result in results for key in result)


@pytest.mark.parametrize("row", [row for row, case in BACKWARD_ROWS.items() if case.deterministic])
def test_keys_and_values_alone(row: str) -> None:
    """dk and dv of a kernel that leaves dq to another have the bits of the one that computes all three."""
    _, case = row_of(row)
    together, alone = (
        run("backward", replace(case, deterministic=alone), emulation_of(case)) for alone in (False, True)
    )
    assert all(alone[key].tobytes() == together[key].tobytes() for key in ("dk", "dv"))


_GROUPS = {"seqlen_q": 203, "seqlen_k": 333, "num_heads": 6, "num_kv_heads": 2, "batch": 2}
SPLIT_GROUPS = [
    Case("causal", **_GROUPS, head_dim=128, causal=True),
    Case("richest", **_GROUPS, head_dim=128, window_size=(150, 20), softcap=2.0, dropout_p=0.2, alibi="head"),
    Case("head-dims", **_GROUPS, head_dim=88, head_dim_v=104, alibi="batch", dtype="float16", causal=True),
    Case("used", **_GROUPS | {"seqlen_q": 333}, head_dim=96, seqused_q=(333, 9), seqused_k=(256, 140), causal=True),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=pytest.mark.slow if number else [])
        for number, case in enumerate(SPLIT_GROUPS)
    ],
)
def test_heads_of_a_group_add_to_sums(case: Case) -> None:
    emulation = replace(emulation_of(case), tile=(("split_groups_from", 1),))
    problem, arrays, *_ = operands(case)
    assert emulation.plan_backward(problem).split_groups
    report = check(run("backward", case, emulation), problem, arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("name", IN_CLUSTERS)
def test_clusters_share_what_is_copied(name: str) -> None:
    case = IN_CLUSTERS[name]
    problem = problem_of(case.problem(), case.arrays())
    for seed in SEEDS:
        schedule = Schedule(seed, resident_blocks=2 + 2 * seed)
        emulation = Emulation("sm_90a", sm_count=2 + 2 * (seed % 3), tile=(("cluster_size", 2),), schedule=schedule)
        assert emulation.plan_forward(problem).cluster_size == 2
        report = check(run("forward", case, emulation), problem, case.arrays())
        assert report.ok, f"\n{report}"


@pytest.mark.parametrize("softmax_scale", [0.125, 3.0])  # maxima within 2^8 of each other, and beyond
@pytest.mark.parametrize("row", ["own output staging", "two consumers in turn"])
def test_rows_may_rescale_lazily(row: str, softmax_scale: float) -> None:
    case = replace(FORWARD_ROWS[row], softmax_scale=softmax_scale)
    arrays = case.arrays()
    emulation = replace(emulation_of(case), tile=(("lazy_rescale", True),))
    report = check(run("forward", case, emulation), problem_of(case.problem(), arrays), arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("row", ["own output staging", "shared output staging", "two consumers in turn"])
def test_dropout_is_drawn_early(row: str) -> None:
    case = replace(FORWARD_ROWS[row], dropout_p=0.2)
    results = [
        run("forward", case, replace(emulation_of(case), tile=(("early_draws", draws),))) for draws in (0, 3)
    ]
    assert all(results[0][key].tobytes() == results[1][key].tobytes() for key in results[0])


@pytest.mark.parametrize("seed", [14, 32, 34])  # schedules under which one barrier for all clears hangs
def test_heads_of_a_group_clear_one_after_another(seed: int) -> None:
    """The warpgroup of dv clears for the next head while that of dk has yet to wait for the head before."""
    shape = {"seqlen_q": 50, "seqlen_k": 333, "num_heads": 16, "num_kv_heads": 1, "head_dim": 136, "head_dim_v": 16}
    case = Case("f", **shape, seqused_q=(40,))
    arrays = case.arrays()
    emulation = Emulation("sm_90a", sm_count=3, schedule=Schedule(seed, resident_blocks=2))
    report = check(run("backward", case, emulation), problem_of(case.problem(), arrays), arrays)
    assert report.ok, f"\n{report}"


def random_case(seed: int) -> Case:
    """Any problem that the Hopper forward takes, with tiles that are empty, whole or cut by any edge."""
    rng = np.random.default_rng(seed)

    def sometimes(probability: float, **keywords: object) -> dict[str, object]:
        return keywords if rng.random() < probability else {}

    num_kv_heads = int(rng.integers(1, 4))
    keywords = {
        "num_heads": num_kv_heads * int(rng.choice([1, 2, 4])),
        "num_kv_heads": num_kv_heads,
        "seqlen_q": int(rng.integers(40, 400)),  # gradients of fewer rows are noise that says nothing about a bound
        "seqlen_k": int(rng.integers(40, 400)),
        "head_dim": int(rng.choice([64, 128, 192, 256, 8 * rng.integers(1, 33)])),
        "dtype": str(rng.choice(["bfloat16", "float16"])),
    }
    keywords |= sometimes(0.3, head_dim_v=8 * int(rng.integers(1, 33)))
    keywords |= sometimes(0.5, causal=[True, "top_left"][rng.integers(2)])
    keywords |= sometimes(0.5, window_size=tuple(int(rng.choice([-1, 0, rng.integers(300)])) for _ in range(2)))
    keywords |= sometimes(0.2, softcap=2.0) | sometimes(0.3, alibi="head") | sometimes(0.2, dropout_p=0.2)
    keywords |= sometimes(0.3, deterministic=True)
    keywords |= sometimes(0.2, softmax_scale=float(rng.choice([-0.1, 0.5])))
    for name, longest in (("seqused_q", keywords["seqlen_q"]), ("seqused_k", keywords["seqlen_k"])):
        keywords |= sometimes(0.3, batch=2, **{name: tuple(map(int, rng.integers(longest + 1, size=2)))})
    return Case(f"random-{seed}", **keywords)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[] if seed < 6 else pytest.mark.slow) for seed in range(30)])
def test_random_problem(seed: int) -> None:
    case = random_case(seed)
    arrays = case.arrays()
    problem = problem_of(case.problem(), arrays)
    emulation = emulation_of(case)
    for pass_ in ("forward", "backward"):
        if getattr(emulation, f"plan_{pass_}")(problem).main_entry.endswith("sm90"):
            report = check(run(pass_, case, emulation), problem, arrays)
            assert report.ok, f"{case}\n{report}"


def test_drops_what_the_documented_counter_drops() -> None:
    """With the identity as v, the output is the matrix of probabilities with its holes."""
    shape = {"batch": 2, "seqlen_q": 203, "seqlen_k": 128, "num_heads": 3, "num_kv_heads": 1, "head_dim_v": 128}
    case = replace(FORWARD_ROWS["own output staging"], **shape, window_size=None)
    arrays = case.arrays()
    arrays.v[...] = np.eye(128, dtype=arrays.v.dtype)[None, :, None]
    problem = problem_of(case.problem(), arrays)
    out = forward(problem, arrays, emulation_of(case))["out"]
    for batch, head in np.ndindex(2, 3):
        keep = keep_mask(problem.dropout, batch, head, np.arange(203), np.arange(128))
        np.testing.assert_array_equal(out[batch, :, head] != 0, keep)


def test_counter_is_left_for_the_next_launch() -> None:
    """One block, and more blocks than tiles are left for: whoever draws last, the counter ends at zero."""
    case = BY_ID["heads-6-2"]
    for sm_count in (1, 2, 11, 12, 132):
        run("forward", case, Emulation("sm_90a", sm_count=sm_count, schedule=Schedule(sm_count, resident_blocks=12)))
