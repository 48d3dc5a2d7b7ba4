"""Bugs for the portable kernels; PLANTED.md tells what they would do on a GPU."""

from __future__ import annotations

from dataclasses import replace

from cases import Case
from emulated import test_backward
from emulated.planted import PLAIN, Bug, NotRepeatable, WrongAnswer
from emulated.twin import TwinError

RACE = "race: this thread"
COPYING = "is being copied to"
BOUNDS = "lies in no array"

GROUPED = Case("grouped", batch=2, seqlen_q=65, seqlen_k=113, num_heads=4, num_kv_heads=2)
MODIFIED = {"softcap": 1.5, "alibi": "head", "sinks": True, "dropout_p": 0.3, "dlse": True}
FEATURES = Case("features", seqlen_q=65, seqlen_k=113, window_size=(60, 5), **MODIFIED)
USED = replace(PLAIN, id="used", batch=2, seqused_q=(65, 40), seqused_k=(113, 70))
EMPTY_ROWS = Case("empty-rows", seqlen_q=113, seqlen_k=65, causal=True)
DETERMINISTIC = replace(test_backward.SCHEDULED, deterministic=True)

FORWARD_BUGS = [
    Bug("missing copy wait", "forward_sm80", "arch::copy_async_wait<0>();", "", TwinError, COPYING),
    Bug("missing barrier before a stage is read", "forward_sm80",
        "arch::block_barrier();  // this block has arrived", "//", TwinError, RACE),
    Bug("missing barrier before the output is staged", "forward_sm80",
        "arch::block_barrier();  // q has been read", "//", TwinError, RACE),
    Bug("stale stage", "forward_sm80", "stage ^= 1;", "", TwinError, RACE),
    Bug("one stage, loaded before it is free", "forward_sm80",
        "arch::block_barrier();\n      if (n_block > blocks.begin)", "if (n_block > blocks.begin)", TwinError, RACE,
        tile="32 rows a warp, one stage"),
    Bug("tiles are loaded without the swizzle", "forward_sm80",
        "tile + swizzled_offset<kRows>(row, column), source",
        "tile + swizzled_offset<kRows>(0, column) + row * kChunkRowBytes, source", WrongAnswer),
    Bug("swizzled columns are added", "forward_sm80",
        "lane_address ^ (column / 16 % 4 * 32)", "lane_address + (column / 16 % 4 * 32)", TwinError, COPYING),
    Bug("rows past the end are loaded", "forward_sm80",
        "first_row + row < end_row && column < columns", "column < columns", TwinError, BOUNDS),
    Bug("columns past head_dim are loaded", "forward_sm80",
        "first_row + row < end_row && column < columns", "first_row + row < end_row", TwinError, BOUNDS,
        case=replace(PLAIN, id="head-dim-40", head_dim=40)),
    Bug("causal mask off by one", "forward_sm80",
        "right - diagonal + row + 1", "right - diagonal + row", WrongAnswer),
    Bug("window off by one", "forward_sm80",
        "row - left - diagonal;", "row - left - diagonal + 1;", WrongAnswer, case=FEATURES),
    Bug("one key too many", "forward_sm80",
        "range.end = seqlen_k - lane_key;", "range.end = seqlen_k - lane_key + 1;", WrongAnswer,
        case=GROUPED),
    Bug("tail keys dropped", "forward_sm80",
        "return {begin / kKeys, ceil_divide(end, kKeys)};", "return {begin / kKeys, end / kKeys};", WrongAnswer),
    Bug("mask skipped on cut tiles", "forward_sm80",
        "cut |= key + kKeys - 1 > query + offset + right", "cut |= key > query + offset + right", WrongAnswer),
    Bug("diagonal ignores used lengths", "forward_sm80",
        "shape.top_left ? 0 : seqlen_k - seqlen_q", "shape.top_left ? 0 : shape.seqlen_k - shape.seqlen_q",
        WrongAnswer, case=USED),
    Bug("wrong kv head of a group", "forward_sm80",
        "kv_head = head / shape.group_size", "kv_head = head % shape.num_kv_heads", WrongAnswer, case=GROUPED),
    Bug("8-bit dropout threshold", "forward_sm80",
        "return word >= threshold;", "return word >> 24 >= threshold >> 24;", WrongAnswer, case=FEATURES),
    Bug("dropout ignores the head", "forward_sm80",
        "static_cast<uint32>(head) | static_cast<uint32>(batch) << 16", "static_cast<uint32>(batch) << 16",
        WrongAnswer, case=FEATURES),
    Bug("missing rescale", "forward_sm80", "tile::scale_rows(out[s], rescale);", "", WrongAnswer),
    Bug("lse in base 2", "forward_sm80",
        "(maximum * unit + arch::log2(sum)) * kLn2", "(maximum * unit + arch::log2(sum))", WrongAnswer),
    Bug("sink forgotten in the denominator", "forward_sm80",
        "state.sum[r] * rescale + arch::exp2(sink_log2 - reference)", "state.sum[r] * rescale", WrongAnswer,
        case=FEATURES),
    Bug("empty rows are NaN", "forward_sm80",
        "return maximum == -arch::infinity() ? 0.f : maximum * unit;", "return maximum * unit;", WrongAnswer,
        case=EMPTY_ROWS),
    Bug("absent rows keep a finite lse", "forward_sm80",
        "keep[r] ? log_sum_exp", "true ? log_sum_exp", WrongAnswer, case=USED),
]  # fmt: skip

BACKWARD_BUGS = [
    Bug("missing barrier before dS is read", "backward_sm80",
        "arch::block_barrier();  // the dS of all warps", "//", TwinError, RACE),
    Bug("missing barrier before dk is staged", "backward_sm80",
        "arch::block_barrier();  // k and v have been read", "//", TwinError, RACE),
    Bug("statistics of the other stage", "backward_sm80",
        "row_lse = statistics + stage * kStatisticBytes + 4 * warp_query",
        "row_lse = statistics + (stage ^ 1) * kStatisticBytes + 4 * warp_query", TwinError, RACE),
    Bug("turn skipped", "backward_sm80",
        "if (arch::thread_index() == 0) arch::wait_for_turn(turn, n_block);", "", NotRepeatable, case=DETERMINISTIC),
    Bug("turn passed before all warps have added", "backward_sm80",
        "arch::memory_fence();\n      arch::block_barrier();", "", NotRepeatable, case=DETERMINISTIC),
    Bug("turn starts too late", "backward_prepare",
        "if constexpr (!Config::window_left) return 0;", "if constexpr (!Config::window_left) return 1;",
        TwinError, "deadlock", case=DETERMINISTIC),
    Bug("only the first head of a group", "backward_sm80",
        "at.head + 1 < end_head ?", "at.head + 2 < end_head ?", WrongAnswer, case=GROUPED),
    Bug("dq accumulator not cleared", "backward_prepare",
        "tile::DqShare<Config>::clear(params, batch, head, m_block);", ";", WrongAnswer),
    Bug("dlse ignored", "backward_prepare", "delta - dlse[i];", "delta;", WrongAnswer, case=FEATURES),
    Bug("empty rows have probabilities", "backward_prepare",
        "lse[i] == -arch::infinity() ? arch::infinity() : lse[i] * kLog2E", "lse[i] * kLog2E",
        WrongAnswer, case=EMPTY_ROWS),
    Bug("dk not scaled", "backward_sm80",
        "scale_k[2] = {params.score.scale, params.score.scale}", "scale_k[2] = {1.f, 1.f}", WrongAnswer),
    Bug("dq not scaled", "backward_finish",
        "factor[2] = {params.score.scale, params.score.scale}", "factor[2] = {1.f, 1.f}", WrongAnswer),
    Bug("derivative of the softcap forgotten", "backward_sm80",
        "if constexpr (Config::softcap) tile::multiply(gradients[s], derivative[s]);", "", WrongAnswer, case=FEATURES),
    Bug("dropout forgotten in dP", "backward_sm80",
        "gradients[s][i] = keep ? gradients[s][i] * params.dropout.scale : 0.f;", "", WrongAnswer, case=FEATURES),
    Bug("dropout of the neighbouring lane", "backward_sm80",
        "parity ? random.word[h] : random.word[2 + h], 4)", "parity ? random.word[h] : random.word[2 + h], 8)",
        WrongAnswer, case=FEATURES),
    Bug("warps that share keys skip the barrier", "backward_sm80",
        "arch::block_barrier();\n      if (work.has(next))", "if (work.has(next))", TwinError, RACE,
        tile="warps share keys"),
    Bug("dsinks sums one warp only", "backward_sinks", "warp < kWarps;", "warp < 1;", WrongAnswer, case=FEATURES),
]  # fmt: skip
