"""Bugs for the Hopper kernels; PLANTED.md tells what they would do on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cases import Case
from emulated.planted import Bug, NotRepeatable, WrongAnswer
from emulated.twin import TwinError

PROXY = "missing proxy fence"
RACE = "race: this thread"
ARRIVING = "is being copied to|was copied to, with no wait"
OVERWRITTEN = "(copies to|writes) shared offset .* (has still to be read|was read)"
UNDER_WAY = "written while this product was under way"
DEADLOCK = "deadlock: waits for"

# More tiles than multiprocessors, two blocks of queries, three of keys, the last of each cut.
TILES = Case("tiles", seqlen_q=203, seqlen_k=333, num_heads=4, num_kv_heads=2, head_dim=128, causal=True)
IN_TURN = replace(TILES, id="in-turn", head_dim=64)
SHARED_STAGING = replace(TILES, id="shared-staging", head_dim=192)
WIDE = replace(TILES, id="wide", head_dim=256, causal=False, seqlen_k=650, seqlen_q=65)
MANY_KEYS = Case("many-keys", seqlen_q=129, seqlen_k=650, head_dim=128)
FEW_KEYS = Case("few-keys", seqlen_q=203, seqlen_k=203, num_heads=8, num_kv_heads=8, head_dim=128)

forward_bug = partial(Bug, entry="forward_sm90", arch="sm_90a", case=TILES)

END_OF_OUTPUT = """arch::product_wait<0>();
      arch::pin(out);
      arch::pin(probabilities);
      if (leader) shared.v.release(use);
      ++use;
    }"""
END_OF_STEP = END_OF_OUTPUT.replace("    }", "      to_probabilities")

FORWARD_BUGS = [
    forward_bug("keys released before their product has ended", error=TwinError, message=OVERWRITTEN, case=MANY_KEYS,
        before="arch::product_wait<1>();\n      arch::pin(scores);\n      if (leader) shared.k.release(use + 1);",
        after="if (leader) shared.k.release(use + 1);\n      arch::product_wait<1>();"),
    forward_bug("values released before their product has ended", error=TwinError, message=OVERWRITTEN, case=WIDE,
        before=END_OF_STEP,
        after="if (leader) shared.v.release(use);\n arch::product_wait<0>();\n ++use;\n to_probabilities"),
    forward_bug("queries released at the start", error=TwinError, message=RACE,
        before="int n_block = blocks.end - 1;\n      {",
        after="int n_block = blocks.end - 1;\n if (leader) shared.q.release(query_use);\n {"),
    forward_bug("producer waits for the wrong parity", error=TwinError, message=DEADLOCK,
        before="(use / kStages & 1) ^ 1", after="(use / kStages & 1)"),
    forward_bug("consumers wait for the wrong parity", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="use / kStages & 1); }", after="use / kStages & 1 ^ 1); }"),
    forward_bug("missing wait for keys", error=TwinError, message=RACE,
        before="      shared.k.wait_full(use + 1);\n", after=""),
    forward_bug("missing wait for values", error=TwinError, message=ARRIVING,
        before="rescale_out();  // the output has no registers to wait in: scale it before its product\n"
               "      shared.v.wait_full(use);",
        after="rescale_out();"),
    forward_bug("half of the bytes announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="full(use % kStages), kFillBytes);", after="full(use % kStages), kFillBytes / 2);"),
    forward_bug("one reader too few counted", error=TwinError,
        before="kConsumers * arch::kWarpgroupSize / kWarpSize;",
        after="kConsumers * arch::kWarpgroupSize / kWarpSize - 1;"),
    forward_bug("barriers unknown to the copy engine", error=TwinError, message="fence_barrier_init is missing",
        before="arch::fence_barrier_init();", after=""),
    forward_bug("barriers used before the block barrier", error=TwinError,
        message="there is no barrier|uses the barrier",
        before="arch::block_barrier();\n  const int warpgroup", after="const int warpgroup"),
    forward_bug("missing proxy fence before the output leaves", error=TwinError, message=PROXY,
        before="    arch::fence_async_proxy();\n", after=""),
    forward_bug("wrong stride between chunks of values", error=WrongAnswer,
        before="operand_b(b, kRowsB * kChunkRowBytes);", after="operand_b(b, kRowsB * kChunkRowBytes / 2);"),
    forward_bug("wrong stride between steps of values", error=WrongAnswer,
        before="operand + 4 * k, operand_b.at(k * 16 * kChunkRowBytes)",
        after="operand + 4 * k, operand_b.at(k * 8 * kChunkRowBytes)"),
    forward_bug("columns past the first chunk never reached", error=WrongAnswer,
        before="k / 4 * (kRows * kChunkRowBytes) + k % 4 * 32", after="k % 4 * 32"),
    forward_bug("keys in place of values", error=TwinError, message=RACE,
        before="probabilities, shared.v.stage(use));\n      turns.pass",
        after="probabilities, shared.k.stage(use));\n      turns.pass"),
    forward_bug("keys of the other stage", error=TwinError, message=RACE,
        before="shared.k.stage(use + 1));\n      if constexpr", after="shared.k.stage(use));\n      if constexpr"),
    forward_bug("missing wait for scores", error=TwinError, message=UNDER_WAY,
        before="arch::product_wait<1>();", after="arch::product_wait<2>();"),
    forward_bug("probabilities overwritten in flight", error=TwinError, message=f"{UNDER_WAY}|{DEADLOCK}", case=WIDE,
        before=END_OF_STEP, after="++use;\n arch::product_wait<1>();\n to_probabilities"),
    forward_bug("output read before its product has ended", error=TwinError, message=UNDER_WAY,
        before=END_OF_OUTPUT, after="if (leader) shared.v.release(use);\n ++use;\n }"),
    forward_bug("missing product fence", error=TwinError, message="no product_fence",
        before="arch::pin(operand);\n  arch::product_fence();", after="arch::pin(operand);"),
    forward_bug("warpgroups multiply the same rows", error=WrongAnswer,
        before="operand_a(a + row_a * kChunkRowBytes, 16), operand_b(b, 16)",
        after="operand_a(a, 16), operand_b(b, 16)"),
    forward_bug("warpgroups store the same rows", error=TwinError, message=f"{PROXY}|{RACE}",
        before="shared.out + (c * kBlockM + group_row)", after="shared.out + (c * kBlockM)"),
    forward_bug("output staged before the last one has left", error=TwinError, message=OVERWRITTEN,
        before="if (storer) arch::copy_to_global_wait_read();  // the previous", after="// the previous"),
    forward_bug("missing barrier before the output is staged", error=TwinError, message=OVERWRITTEN,
        before="has left its place\n    arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);",
        after="has left its place"),
    forward_bug("missing barrier after the output is staged", error=TwinError, message=f"{PROXY}|no barrier in between",
        before="arch::fence_async_proxy();\n"
               "    arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);",
        after="arch::fence_async_proxy();"),
    forward_bug("q loaded before the output has left its place", error=TwinError,
        message=OVERWRITTEN, case=SHARED_STAGING,
        before="if (storer) arch::copy_to_global_wait_read();  // q's place", after="// q's place"),
    forward_bug("block ends before its output has left", error=TwinError, message="leaves the kernel without a wait",
        before="  if (arch::thread_index() % arch::kWarpgroupSize == 0) arch::copy_to_global_wait_read();", after=""),
    forward_bug("slot of the tile queue given back by one lane for all", error=TwinError, message=RACE, case=FEW_KEYS,
        before="arch::warp_barrier();\n    if (arch::lane_index() == 0) arch::barrier_arrive",
        after="if (arch::lane_index() == 0) arch::barrier_arrive"),
    forward_bug("tile counter not reset", error=AssertionError, message="does not leave its tile counter at zero",
        before="if (drawn == num_tiles - 1) *counter = 0;", after=""),
    forward_bug("nobody starts the turns", error=TwinError, message=DEADLOCK, case=IN_TURN,
        before="turns.prime();", after=""),
    forward_bug("turns of half as many threads", error=TwinError,
        message="is for 128 threads here, for 256", case=IN_TURN,
        before="arch::named_barrier_sync(1 + consumer, 2 * arch::kWarpgroupSize)",
        after="arch::named_barrier_sync(1 + consumer, arch::kWarpgroupSize)"),
    forward_bug("producer keeps too many registers", error=TwinError, message=DEADLOCK,
        before="kConsumers == 2 ? 40 : 32", after="kConsumers == 2 ? 56 : 32"),
    forward_bug("tail of keys not masked", error=WrongAnswer, case=MANY_KEYS,
        before="modify(scores, n_block, True{});", after="modify(scores, n_block, False{});"),
    forward_bug("output not rescaled", error=WrongAnswer,
        before="tile::scale_rows(out, rescale);", after=";"),
]  # fmt: skip

HALVES = Case("halves", seqlen_q=203, seqlen_k=203, num_kv_heads=1, head_dim=128, causal=True)
ROWS = replace(HALVES, id="rows", seqlen_q=333, head_dim=64)
HOLES = replace(HALVES, id="holes", dropout_p=0.3)
CAPPED = replace(HALVES, id="capped", softcap=1.0)
# Four blocks of keys; in float16, because bfloat16 rounds most orders of a sum to the same bits.
REPEATABLE = Case("repeatable", seqlen_q=113, seqlen_k=450, dtype="float16", deterministic=True)

backward_bug = partial(Bug, entry="backward_sm90", arch="sm_90a", case=HALVES)

BACKWARD_BUGS = [
    backward_bug("missing proxy fence before dS is read", error=TwinError, message=PROXY,
        before="arch::fence_async_proxy();\n      arch::named_barrier_sync(kDsBarrier",
        after="arch::named_barrier_sync(kDsBarrier"),
    backward_bug("missing barrier between the warpgroups' dS", error=TwinError, message=RACE,
        before="arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // the dS", after="// the dS"),
    backward_bug("one stage of dS", error=TwinError, message=OVERWRITTEN,
        before="ds + use % 2 * kDsBytes", after="ds"),
    backward_bug("dS stored without transposing its blocks", error=WrongAnswer,
        before="16 * t + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8",
        after="16 * t + lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8"),
    backward_bug("queries of the backward released early", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait<0>();\n    arch::pin(dk);\n    arch::pin(ds);\n"
               "    if (leader) shared.q.release(use);",
        after="if (leader) shared.q.release(use);\n    arch::product_wait<0>();"),
    backward_bug("dS overwritten in flight", error=TwinError, message=UNDER_WAY,
        before="arch::product_wait<0>();\n    arch::pin(dk);", after="arch::pin(dk);"),
    backward_bug("statistics not announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="kQueryBytes + kStatisticSpace, kQueryBytes + kStatisticBytes>",
        after="kQueryBytes + kStatisticSpace, kQueryBytes>"),
    backward_bug("missing proxy fence before dq leaves", error=TwinError, message=PROXY,
        before="arch::fence_async_proxy();\n      arch::named_barrier_arrive(kDqFullBarrier",
        after="arch::named_barrier_arrive(kDqFullBarrier"),
    backward_bug("dq overwritten before it has left", error=TwinError, message=OVERWRITTEN,
        before="if (leader) arch::copy_to_global_wait_read<1>();", after=""),
    backward_bug("missing barrier before dq is written", error=TwinError, message=RACE,
        before="arch::named_barrier_sync(kDqEmptyBarrier + consumer, kDqThreads);", after=""),
    backward_bug("nobody says that dq is empty", error=TwinError, message=DEADLOCK,
        before="arch::named_barrier_arrive(kDqEmptyBarrier + consumer, kDqThreads);  // in the store warp's stead",
        after=";"),
    backward_bug("halves of dq swapped", error=TwinError, message=RACE,
        before="shared.dq_half(consumer), kDqHalf * 4", after="shared.dq_half(1 - consumer), kDqHalf * 4"),
    backward_bug("both halves of dq from the same columns", error=WrongAnswer,
        before="shared.keys(), consumer);", after="shared.keys(), 0);"),
    backward_bug("both halves of dq from the same rows", error=WrongAnswer, case=ROWS,
        before="shared.ds_stage(use), group_key", after="shared.ds_stage(use), 0"),
    backward_bug("dk staged while k is read", error=TwinError, message=OVERWRITTEN,
        before="arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // k and v", after="// k and v"),
    backward_bug("cut scores not masked", error=WrongAnswer,
        before="if (cut) band.template select<KeyRows>(part_scores, -arch::infinity(), part_query, key);", after=""),
    backward_bug("next step's drops decided too late", error=WrongAnswer, case=HOLES,
        before="decide_dropped(here.next(work.blocks));", after="decide_dropped(here);"),
    backward_bug("drops unmarked", error=WrongAnswer, case=HOLES,
        before="scores[i] = dropped.mark(i, scores[i]);", after=";"),
    backward_bug("dP without holes", error=WrongAnswer, case=HOLES,
        before="is_dropped ? 0.f : gradients[i], common", after="gradients[i], common"),
    backward_bug("dS of marked probabilities", error=WrongAnswer, case=HOLES,
        before="arch::absolute(scores[i])", after="scores[i]"),
    backward_bug("slope of the cap left out", error=WrongAnswer, case=CAPPED,
        before="gradients[i] *= arch::multiply_add(-capped, capped, 1.f);", after=""),
    backward_bug("capped dP read while its product runs", error=TwinError, message=UNDER_WAY, case=CAPPED,
        before="arch::product_wait<0>();\n      arch::pin(scores);",
        after="arch::product_wait<1>();\n      arch::pin(scores);"),
    backward_bug("mask of the first part for all", error=WrongAnswer, case=CAPPED,
        before="select<KeyRows>(part_gradients, 0.f, query + part * kPartQueries, key);",
        after="select<KeyRows>(part_gradients, 0.f, query, key);"),
    backward_bug("turn passed before dq has arrived", error=NotRepeatable, case=REPEATABLE,
        before="        arch::copy_to_global_wait();\n", after=""),
    backward_bug("turn of the store warp skipped", error=NotRepeatable, case=REPEATABLE,
        before="if (leader) arch::wait_for_turn(turn, work.n_block);", after=""),
]  # fmt: skip
