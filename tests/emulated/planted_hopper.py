"""Bugs for the Hopper kernels; PLANTED.md tells what they would do on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cases import Case
from emulated.planted import Bug, WrongAnswer
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
SHARED_STAGING = Case("shared-staging", seqlen_q=1040, seqlen_k=60, num_heads=2, num_kv_heads=1, head_dim=256)
WIDE = replace(TILES, id="wide", head_dim=256, causal=False, seqlen_k=650, seqlen_q=65)
# The compiler, not the kernel, says where to wait for the output's product.
IN_ORDER = Case("in-order", seqlen_q=129, seqlen_k=650, head_dim=64)
MANY_KEYS = Case("many-keys", seqlen_q=129, seqlen_k=650, head_dim=128)
# Every tile's warpgroups end in different blocks of keys.
PASSING = Case("passing", seqlen_q=580, seqlen_k=580, head_dim=64, causal=True)
MANY_QUERIES = Case("many-queries", seqlen_q=700, seqlen_k=300, num_heads=4, num_kv_heads=4, head_dim=256)
FEW_KEYS = Case("few-keys", seqlen_q=203, seqlen_k=203, num_heads=8, num_kv_heads=8, head_dim=128)
# Sequences whose keys end within a block that some warpgroups need and others let pass by.
PADDED = replace(TILES, id="padded", batch=2, seqused_q=(150, 203), seqused_k=(150, 333))
PADDED_FULL = replace(PADDED, id="padded-full", causal=False)  # without turns, which would order most of it
PADDED_IN_TURN = replace(PADDED, id="padded-in-turn", head_dim=64, seqlen_q=333, seqused_q=(150, 333))

# Four heads in a tile, two in a warpgroup, each with a slope of its own.
PACKED = Case("packed", batch=2, seqlen_q=20, seqlen_k=203, num_heads=8, num_kv_heads=2, head_dim=128, alibi="head")

forward_bug = partial(Bug, entry="forward_sm90", arch="sm_90a", case=TILES)
# Clusters of two blocks of queries; in the second sequence only the first block has any.
CLUSTER = {"arch": "sm_90a", "row": (("cluster_size", 2),)}
NEIGHBOURS = replace(TILES, id="clusters", seqlen_q=500, num_kv_heads=4, causal=False, batch=2, seqused_q=(500, 65))
clustered = partial(Bug, entry="forward_sm90", case=NEIGHBOURS, **CLUSTER)
DRAWN = replace(MANY_KEYS, id="drawn", dropout_p=0.3)

END_OF_OUTPUT = """arch::product_wait<0>();
      arch::pin(out);
      arch::pin(probabilities);
      shared.v.release(use, arch::lane_index());
      ++use;
    }"""
END_OF_STEP = END_OF_OUTPUT.replace("    }", "      drop")
CLEAR = "    clear_absent_values(shared, use, loaded, sequence.seqlen_k, shape.seqlen_k);"

FORWARD_BUGS = [
    forward_bug("keys released before their product has ended", error=TwinError, message=OVERWRITTEN, case=MANY_KEYS,
        before="arch::product_wait<1>();\n      arch::pin(scores);\n"
               "      shared.k.release(use + 1, arch::lane_index());",
        after="shared.k.release(use + 1, arch::lane_index());\n      arch::product_wait<1>();"),
    forward_bug("values released before their product has ended", error=TwinError, message=OVERWRITTEN, case=IN_ORDER,
        before=END_OF_STEP,
        after="shared.v.release(use, arch::lane_index());\n arch::product_wait<0>();\n ++use;\n drop"),
    forward_bug("queries released at the start", error=TwinError, message=f"{RACE}|{DEADLOCK}",
        before="      int n_block = blocks.end - 1;\n      if (kHalves",
        after="int n_block = blocks.end - 1;\n if (leader) shared.q.release(query_use);\n if (kHalves"),
    forward_bug("producer waits for the wrong parity", error=TwinError, message=DEADLOCK,
        before="(use / kStages & 1) ^ 1", after="(use / kStages & 1)"),
    forward_bug("consumers wait for the wrong parity", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="use / kStages & 1); }\n  // Consumer: a warp",
        after="use / kStages & 1 ^ 1); }\n  // Consumer: a warp"),
    forward_bug("missing wait for keys", error=TwinError, message=RACE,
        before="      shared.k.wait_full(use + 1);\n", after=""),
    forward_bug("missing wait for values", error=TwinError, message=ARRIVING,
        before="shared.k.stage(use + 1));\n      if constexpr (kRescalesFirst) rescale_out();\n"
               "      shared.v.wait_full(use);",
        after="shared.k.stage(use + 1));\n      if constexpr (kRescalesFirst) rescale_out();"),
    forward_bug("half of the bytes announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="kFillBytes);\n    return", after="kFillBytes / 2);\n    return"),
    forward_bug("one reader too few counted", error=TwinError,
        before="kConsumers * arch::kWarpgroupSize / kWarpSize;",
        after="kConsumers * arch::kWarpgroupSize / kWarpSize - 1;"),
    forward_bug("barriers unknown to the copy engine", error=TwinError, message="fence_barrier_init is missing",
        before="arch::fence_barrier_init();", after=""),
    forward_bug("barriers used before the block barrier", error=TwinError,
        message="there is no barrier|uses the barrier",
        before="if (kCtas == 1) arch::block_barrier();\n  else arch::cluster_begin();\n", after=""),
    forward_bug("missing proxy fence before the output leaves", error=TwinError, message=PROXY,
        before="      arch::fence_async_proxy();\n", after=""),
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
        before=END_OF_STEP, after="++use;\n arch::product_wait<1>();\n drop"),
    forward_bug("output read before its product has ended", error=TwinError, message=UNDER_WAY,
        before=END_OF_OUTPUT, after="shared.v.release(use, arch::lane_index());\n ++use;\n }"),
    forward_bug("missing product fence", error=TwinError, message="no product_fence",
        before="arch::pin(operand);\n  arch::product_fence();", after="arch::pin(operand);"),
    forward_bug("warpgroups multiply the same rows", error=WrongAnswer,
        before="operand_a(a + row_a * kChunkRowBytes, 16), operand_b(b, 16)",
        after="operand_a(a, 16), operand_b(b, 16)"),
    forward_bug("warpgroups store the same rows", error=TwinError, message=f"{PROXY}|{RACE}",
        before="params.out, shared.out, row,", after="params.out, shared.out, row - group_row,"),
    forward_bug("output staged before the last one has left", error=TwinError, message=OVERWRITTEN,
        before="if (storer) arch::copy_to_global_wait_read();  // what was", after="// what was"),
    forward_bug("missing barrier before the output is staged", error=TwinError, message=OVERWRITTEN,
        before="before has left\n      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);",
        after="before has left"),
    forward_bug("missing barrier after the output is staged", error=TwinError, message=f"{PROXY}|no barrier in between",
        before="arch::fence_async_proxy();\n"
               "      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);",
        after="arch::fence_async_proxy();"),
    forward_bug("q loaded before the output has left its place", error=TwinError,
        message=OVERWRITTEN, case=SHARED_STAGING,
        before="if (storer) arch::copy_to_global_wait_read();  // q's place", after="// q's place"),
    forward_bug("block ends before its output has left", error=TwinError, message="leaves the kernel without a wait",
        before="  if (arch::thread_index() % arch::kWarpgroupSize == 0) arch::copy_to_global_wait_read();", after=""),
    forward_bug("slot of the tile queue given back by one lane for all", error=TwinError, message=RACE, case=FEW_KEYS,
        before="arch::warp_barrier();\n    if (arch::lane_index() == 0) release(use);",
        after="if (arch::lane_index() == 0) release(use);"),
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
    forward_bug("queries released before the last scores", error=TwinError, message=f"{OVERWRITTEN}|{RACE}",
        case=MANY_QUERIES,
        before="(leader & (n_block == blocks.begin))) shared.q.release(query_use);\n\n",
        after="(leader & (n_block == blocks.begin + 1))) shared.q.release(query_use);\n\n"),
    forward_bug("a passing block not given back", error=TwinError, message=DEADLOCK, case=PASSING,
        before="        shared.v.release(use, arch::lane_index());\n      }\n    };", after="      }\n    };"),
    forward_bug("a block passes out of turn", error=TwinError, message=DEADLOCK, case=PASSING,
        before="        turns.wait();\n        turns.pass();\n", after=""),
    forward_bug("half of the first block too often", error=WrongAnswer, case=PASSING,
        before=".end < 2 * blocks.end)", after=".end <= 2 * blocks.end)"),
    forward_bug("probabilities of the last tile beyond the first half", error=WrongAnswer, case=PASSING,
        before="i < kKeys / 4 ? visible[i] : 0;", after="i < kKeys / 4 ? visible[i] : visible[i % (kKeys / 4)];"),
    forward_bug("output not rescaled", error=WrongAnswer,
        before="tile::scale_rows(out, rescale);", after=";"),
    forward_bug("values of absent keys not cleared", error=WrongAnswer, case=PADDED,
        before="|| !absent.exist()) return;", after="|| true) return;"),
    forward_bug("values of absent keys cleared from the next row on", error=WrongAnswer, case=PADDED,
        before="begin(used - first_row)", after="begin(used + 1 - first_row)"),
    forward_bug("values of absent keys cleared in the first chunk only", error=WrongAnswer, case=PADDED,
        before="for (int c = 0; c < chunks(kColumns); ++c)\n#pragma unroll 1", after="for (int c = 0; c < 1; ++c)"),
    forward_bug("values of absent keys cleared before they arrive", error=TwinError, message=f"{ARRIVING}|{RACE}",
        case=PADDED,
        before="shared.v.wait_full(use);\n    absent.", after="absent."),
    forward_bug("missing proxy fence after values are cleared", error=TwinError, message=PROXY, case=PADDED,
        before="arch::fence_async_proxy();\n  arch::warp_barrier();", after="arch::warp_barrier();"),
    forward_bug("missing barrier after values are cleared", error=TwinError, message=f"{RACE}|{PROXY}",
        case=PADDED_FULL,
        before="  meet();\n", after=""),
    forward_bug("a passing warpgroup does not clear", error=TwinError, message=DEADLOCK, case=PADDED_IN_TURN,
        before=CLEAR, after=f"if (blocks.end == loaded.end) {CLEAR}"),
    forward_bug("a warpgroup clears in its turn", error=TwinError, message=DEADLOCK, case=PADDED_IN_TURN,
        before=CLEAR, after=f"turns.wait();\n{CLEAR}\n    turns.pass();"),
    forward_bug("every packed head has the first one's queries", error=WrongAnswer, case=PACKED,
        before="at.block * kQueries, at.head + h, at.batch", after="at.block * kQueries, at.head, at.batch"),
    forward_bug("packed heads over each other", error=TwinError, message=RACE, case=PACKED,
        before="q_tile + h * kQueries * tile::kChunkRowBytes",
        after="q_tile + h * tile::kSlabRows * tile::kChunkRowBytes"),
    forward_bug("packed heads have one slope", error=WrongAnswer, case=PACKED,
        before="at.head + head_of(warp_row)", after="at.head + head_of(group_row)"),
    forward_bug("rows of packed heads counted through", error=WrongAnswer, case=PACKED,
        before="first_query + query_of(warp_in_group * tile::kSlabRows)",
        after="first_query + warp_in_group * tile::kSlabRows"),
    forward_bug("packed heads stored as one", error=WrongAnswer, case=PACKED,
        before="at.head + head_of(row), at.batch", after="at.head, at.batch"),
    clustered("readers of other blocks not counted", error=TwinError, message=f"{RACE}|one arrival too many",
        before="kCtas * readers);\n", after="readers);\n"),
    clustered("buffers given back to the own block alone", error=TwinError, message=DEADLOCK,
        before="if (lane < kCtas) arch::barrier_arrive(", after="if (lane < 1) arch::barrier_arrive("),
    clustered("every block copies all of a tile", error=TwinError, message=f"{RACE}|{DEADLOCK}",
        before="if (static_cast<int>((c + turn) % kCtas) == arch::cluster_rank<kCtas>())", after=""),
    clustered("parts of a tile come to one block", error=TwinError, message=DEADLOCK,
        before="kAll = (1u << kCtas) - 1;", after="kAll = 1;"),
    clustered("barriers used before the cluster's", error=TwinError, message="no barrier of the cluster since",
        before="else arch::cluster_begin();", after="else arch::block_barrier();"),
    clustered("a block leaves before the others are done", error=TwinError, message="the block leaves|has left",
        before="  if (kCtas > 1) arch::cluster_end();", after=""),
    clustered("keys of one block alone", error=(TwinError, WrongAnswer),
        before="(block / kCtas * kClusterQueries)", after="(block * kQueries)"),
    clustered("blocks of a cluster have one tile", error=WrongAnswer,
        before="kCtas == 1 ? at.block : at.block * kCtas + arch::cluster_rank<kCtas>()", after="at.block * kCtas"),
    clustered("the rank of a block in a descriptor", error=(TwinError, WrongAnswer),
        before="kDescriptorAddressBits = (1u << 18) - 1;", after="kDescriptorAddressBits = ~0u;"),
    clustered("a tile sent unannounced", error=TwinError, message=f"{RACE}|{DEADLOCK}",
        before="arch::barrier_arrive_expecting(its_full, sizeof(uint32));", after="arch::barrier_arrive(its_full);"),
    clustered("own producer counted as a reader of the queue", error=TwinError, message=DEADLOCK,
        before="kCtas * readers + kCtas - 1", after="kCtas * readers + kCtas"),
    forward_bug("dropout drawn for the next block", error=WrongAnswer, row=(("early_draws", 4),), case=DRAWN,
        before="dropout.draw(draws, query, n_block * kBlockN);",
        after="dropout.draw(draws, query, (n_block + 1) * kBlockN);"),
]  # fmt: skip

HALVES = Case("halves", seqlen_q=203, seqlen_k=203, num_kv_heads=1, head_dim=128, causal=True)
ROWS = replace(HALVES, id="rows", seqlen_q=333, head_dim=64)
HOLES = replace(HALVES, id="holes", dropout_p=0.3)
MANY_TILES = replace(HALVES, id="many-tiles", batch=4)
SPLIT = {"case": replace(HALVES, id="split", num_heads=4, num_kv_heads=2), "row": (("split_groups_from", 1),)}
CAPPED = replace(HALVES, id="capped", softcap=1.0)
NO_KEYS = replace(HALVES, id="no-keys", seqlen_q=333, seqlen_k=100)
WINDOW = replace(HALVES, id="window", causal=False, window_size=(70, 0))

# Key padding that ends within a block; of queries in one that a warpgroup is blind for.
PADDED_KEYS = Case("padded-keys", seqlen_q=203, seqlen_k=203, num_kv_heads=1, head_dim=128, seqused_k=(150,))
PADDED_QUERIES = replace(PADDED_KEYS, id="padded-queries", seqused_k=None, seqused_q=(150,))
PADDED_BATCH = replace(PADDED_QUERIES, id="padded-batch", batch=4, seqused_q=(150, 130, 30, 203))
PADDED_BLIND = replace(PADDED_QUERIES, id="padded-blind", causal="top_left", seqused_q=(30,))
PADDED_KEYS_ALONE = replace(PADDED_KEYS, id="padded-keys-alone", head_dim=192)
PADDED_QUERIES_ALONE = replace(PADDED_QUERIES, id="padded-queries-alone", head_dim=192)

backward_bug = partial(Bug, entry="backward_sm90", arch="sm_90a", case=HALVES)

BACKWARD_BUGS = [
    backward_bug("missing proxy fence before dS is read", error=TwinError, message=PROXY,
        before="arch::fence_async_proxy();\n      arch::named_barrier_sync(kDsBarrier",
        after="arch::named_barrier_sync(kDsBarrier"),
    backward_bug("missing barrier between the warpgroups' dS", error=TwinError, message=RACE,
        before="arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // the dS", after="// the dS"),
    backward_bug("one stage of dS", error=TwinError, message=f"{OVERWRITTEN}|{RACE}",
        before="ds + use % 2 * kDsBytes", after="ds"),
    backward_bug("dS stored without transposing its blocks", error=WrongAnswer,
        before="16 * t + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8",
        after="16 * t + lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8"),
    backward_bug("queries of the backward released early", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait<0>();\n    arch::pin(dk);\n    arch::pin(ds);\n"
               "    shared.q.release(use, arch::lane_index());",
        after="shared.q.release(use, arch::lane_index());\n    arch::product_wait<0>();"),
    backward_bug("dS overwritten in flight", error=TwinError, message=UNDER_WAY,
        before="arch::product_wait<0>();\n    arch::pin(dk);", after="arch::pin(dk);"),
    backward_bug("statistics not announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="tile::Pipeline<2, kQueryBytes, kQueryBytes + kStatisticBytes>",
        after="tile::Pipeline<2, kQueryBytes>"),
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
    backward_bug("halves of dq swapped", error=WrongAnswer,
        before="accumulator + consumer * kDqHalf", after="accumulator + (1 - consumer) * kDqHalf"),
    backward_bug("dq added to before its first part is there", error=WrongAnswer,
        before="arch::wait_for_turn(begun, 1);", after=""),
    backward_bug("dq said to be begun before its first part is written", error=WrongAnswer,
        before="if (!is_mine) return;\n    arch::copy_to_global_wait();\n", after="if (!is_mine) return;\n"),
    backward_bug("a tile said to be done before its dq is written", error=WrongAnswer, case=MANY_TILES,
        before="const Work& work) {\n    arch::copy_to_global_wait();\n", after="const Work& work) {\n"),
    backward_bug("dq converted before its tiles are done", error=WrongAnswer,
        before="if (leader) arch::wait_for_turn<kNapNanoseconds>(tiles_done(params) + pair_of_tiles, tiles);",
        after=""),
    backward_bug("parts of dq counted from what was there", entry="backward_prepare", error=WrongAnswer,
        before="if (arch::block_index() == 0) *tile::parts_taken(params) = 0;", after=""),
    backward_bug("neighbours keep what they should exchange", error=WrongAnswer,
        before="arch::shuffle_xor(is_odd ? pairs[0] : pairs[1], 1)",
        after="arch::shuffle_xor(is_odd ? pairs[1] : pairs[0], 1)"),
    backward_bug("dq begun by every key block", error=WrongAnswer,
        before="if (start.is_mine)\n", after="if (work.n_block >= 0)\n"),
    backward_bug("dq of queries without keys not made zeros", error=WrongAnswer, case=NO_KEYS,
        before="begun = *turn_of<Config>(params, batch, head, m_block) != 0;", after="begun = true;"),
    backward_bug("both halves of dq from the same columns", error=WrongAnswer,
        before="shared.k.data, consumer);", after="shared.k.data, 0);"),
    backward_bug("both halves of dq from the same rows", error=WrongAnswer, case=ROWS,
        before="shared.ds_stage(use), group_key", after="shared.ds_stage(use), 0"),
    backward_bug("keys given back while they are read", error=TwinError, message=OVERWRITTEN, case=MANY_TILES,
        before="arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // k and v", after="// k and v"),
    backward_bug("blind where keys are seen", error=WrongAnswer,
        before="query + kBlockM - 1 + sequence.offset + shape.window_right < first_key + group_key",
        after="query + sequence.offset + shape.window_right < first_key + group_key + kBlockM"),
    backward_bug("blind where a window begins", error=WrongAnswer, case=WINDOW,
        before="first_key + group_key + tile::kWarpgroupRows <= query + sequence.offset",
        after="first_key + group_key <= query + sequence.offset"),
    backward_bug("a blind warpgroup decides no drops", error=WrongAnswer, case=replace(WINDOW, dropout_p=0.3),
        before="if constexpr (Config::window_left) decide_dropped(work.next(here));", after=""),
    backward_bug("a blind warpgroup leaves its last dS", error=(TwinError, WrongAnswer),
        before="tile::store_operand_transposed<kBlockM>(shared.ds_stage(use), warp_key, no_ds);", after=""),
    backward_bug("cut scores not masked", error=WrongAnswer,
        before="if (cut) band.template select<KeyRows>(part_scores, -arch::infinity(), part_query, key);", after=""),
    backward_bug("next step's drops decided too late", error=WrongAnswer, case=HOLES,
        before="decide_dropped(work.next(here));  // beside", after="decide_dropped(here);  // beside"),
    backward_bug("drops unmarked", error=WrongAnswer, case=HOLES,
        before="scores[i] = dropped.mark(i, scores[i]);", after=";"),
    backward_bug("dP without holes", error=WrongAnswer, case=HOLES,
        before="is_dropped ? 0.f : gradients[i], common", after="gradients[i], common"),
    backward_bug("dS of marked probabilities", error=WrongAnswer, case=HOLES,
        before="arch::absolute(scores[i])", after="scores[i]"),
    backward_bug("slope of the cap left out", error=WrongAnswer, case=CAPPED,
        before="centred(i) * modifier.derivative(scores[i]);", after="centred(i);"),
    backward_bug("capped dP read while its product runs", error=TwinError, message=UNDER_WAY, case=CAPPED,
        before="modifier.cap(scores);\n      row_delta.load_ahead();\n      arch::product_wait_here(shape.num_heads);",
        after="modifier.cap(scores);\n      row_delta.load_ahead();"),
    backward_bug("mask of the first part for all", error=WrongAnswer, case=CAPPED,
        before="select<KeyRows>(part_gradients, 0.f, query + part * kPartQueries, key);",
        after="select<KeyRows>(part_gradients, 0.f, query, key);"),
    backward_bug("absent keys not cleared", error=WrongAnswer, case=PADDED_KEYS,
        before="if (!absent.exist() || work.is_empty()) return;", after="return;"),
    backward_bug("absent keys cleared before they arrive", error=TwinError, message=f"{ARRIVING}|{RACE}",
        case=PADDED_KEYS,
        before="shared.k.wait_full(round);", after=""),
    backward_bug("values of the tile before", error=TwinError, message=f"{ARRIVING}|{RACE}", case=MANY_TILES,
        before="shared.v.wait_full(round);", after=""),
    backward_bug("dk staged before dv has left", error=TwinError, message=OVERWRITTEN,
        before="if (storer) arch::copy_to_global_wait_read();\n  arch::named_barrier_sync(kStoreBarrier",
        after="arch::named_barrier_sync(kStoreBarrier"),
    backward_bug("missing barrier before a gradient is staged", error=TwinError, message=f"{OVERWRITTEN}|{RACE}",
        before="arch::copy_to_global_wait_read();\n  arch::named_barrier_sync(kStoreBarrier + consumer, "
               "arch::kWarpgroupSize);",
        after="arch::copy_to_global_wait_read();"),
    backward_bug("absent queries not cleared", error=WrongAnswer, case=PADDED_QUERIES,
        before="    absent.template clear<Config::head_dim, kThreads>(q.stage(use));\n", after=""),
    backward_bug("dout of absent queries not cleared", error=WrongAnswer, case=PADDED_QUERIES,
        before="    absent.template clear<Config::head_dim_v, kThreads>(dout.stage(use));\n", after=""),
    backward_bug("dout cleared before it arrives", error=TwinError, message=f"{ARRIVING}|{RACE}", case=PADDED_BATCH,
        before="    dout.wait_full(use);\n    absent", after="    absent"),
    backward_bug("missing proxy fence after queries are cleared", error=TwinError, message=PROXY, case=PADDED_QUERIES,
        before="arch::fence_async_proxy();\n  arch::warp_barrier();", after="arch::warp_barrier();"),
    backward_bug("missing barrier after queries are cleared", error=TwinError, message=f"{RACE}|{PROXY}",
        case=PADDED_QUERIES,
        before="  meet();\n", after=""),
    backward_bug("a blind warpgroup does not clear", error=TwinError, message=DEADLOCK, case=PADDED_BLIND,
        before="tile::clear_absent_queries<Config, kBlockM, kConsumerThreads>(",
        after="if (query + kBlockM - 1 + sequence.offset + shape.window_right >= first_key + group_key)\n"
              "      tile::clear_absent_queries<Config, kBlockM, kConsumerThreads>("),
    backward_bug("every head of a group by itself reads keys of its own", error=WrongAnswer, **SPLIT,
        before="return kSplitGroups ? at.head / shape.group_size : at.head;",
        after="return at.head % shape.num_kv_heads;"),
    backward_bug("sums of dv begin where those of dk do", error=WrongAnswer, **SPLIT,
        before="add_gradient(common, dv, done, warp_key, Config::head_dim);",
        after="add_gradient(common, dv, done, warp_key, 0);"),
    backward_bug("sums of a group not cleared", error=WrongAnswer, **SPLIT, entry="backward_prepare",
        before="tile::GroupSums<Config>::clear", after="if (thread < 0) tile::GroupSums<Config>::clear"),
]  # fmt: skip

# dq alone: two warpgroups of queries, as many blocks of keys as it takes to come back to a buffer.
ALONE = Case("alone", seqlen_q=203, seqlen_k=450, num_kv_heads=1, head_dim=256)
ALONE_CUT = Case("alone-cut", seqlen_q=203, seqlen_k=203, head_dim=128, causal=True, deterministic=True)
WIDE_HOLES = Case("wide-holes", seqlen_q=203, seqlen_k=203, head_dim=192, dropout_p=0.3)
WIDE_CAPPED = Case("wide-capped", seqlen_q=203, seqlen_k=203, head_dim=192, softcap=1.5)
CUT = replace(WIDE_HOLES, id="cut", dropout_p=0.0, causal=True)
queries_bug = partial(Bug, entry="backward_queries_sm90", arch="sm_90a", case=ALONE)

QUERIES_BUGS = [
    queries_bug("scores of dq changed before they are there", error=TwinError, message=UNDER_WAY,
        before="arch::product_wait<1>();\n    arch::pin(scores);", after="arch::pin(scores);"),
    queries_bug("dP of dq changed before it is there", error=TwinError, message=f"{UNDER_WAY}|{OVERWRITTEN}",
        before="arch::product_wait_here(shape.num_heads);", after=""),
    queries_bug("keys released before dq has read them", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait<2>();", after=""),
    queries_bug("values released before dP has read them", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait_here(shape.num_heads);\n    arch::pin(gradients);\n"
               "    if (leader) shared.v.release(use);",
        after="if (leader) shared.v.release(use);\n    arch::product_wait_here(shape.num_heads);"),
    queries_bug("missing wait for the keys of dq", error=TwinError, message=RACE,
        before="    shared.k.wait_full(use);\n    tile::start", after="    tile::start"),
    queries_bug("missing wait for the values of dq", error=TwinError, message=f"{RACE}|{ARRIVING}",
        before="    shared.v.wait_full(use);\n", after=""),
    queries_bug("dout not announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="tile::Pipeline<1, kQueryBytes + kDoutBytes>",
        after="tile::Pipeline<1, kQueryBytes + kDoutBytes, kQueryBytes>"),
    queries_bug("one reader of keys too few counted", error=TwinError,
        before="shared.k.init(kReaders);", after="shared.k.init(kReaders - 1);"),
    queries_bug("missing proxy fence before dq is stored", error=TwinError, message=PROXY,
        before="arch::fence_async_proxy();\n  arch::named_barrier_sync(kStoreBarrier",
        after="arch::named_barrier_sync(kStoreBarrier"),
    queries_bug("warpgroups store the same rows of dq", error=TwinError, message=f"{PROXY}|{RACE}",
        before="shared.queries(), group_row, 0,", after="shared.queries(), 0, 0,"),
    queries_bug("wrong stride between chunks of dq", error=(TwinError, WrongAnswer),
        before="((c - first_chunk) * kRows + tile_row)", after="((c - first_chunk) * kRows / 2 + tile_row)"),
    queries_bug("delta of the thread's other row", error=WrongAnswer,
        before="(gradients[i] - delta[i / 2 % 2])", after="(gradients[i] - delta[1 - i / 2 % 2])"),
    queries_bug("cut dS of dq not masked", error=WrongAnswer, case=ALONE_CUT,
        before="band.template select<QueryRows>(gradients, 0.f, query, key);", after=";"),
    queries_bug("dP of dq without holes", error=WrongAnswer, case=WIDE_HOLES,
        before="keep ? gradients[i] * common.dropout.scale : 0.f", after="gradients[i] * common.dropout.scale"),
    queries_bug("softcap of dq without its derivative", error=WrongAnswer, case=WIDE_CAPPED,
        before="if constexpr (Config::softcap) tile::multiply(scores, derivative);", after=""),
    queries_bug("absent keys of dq not cleared", error=WrongAnswer, case=PADDED_KEYS_ALONE,
        before="if (!absent.exist()) return;\n    constexpr int kAll", after="return;\n    constexpr int kAll"),
    queries_bug("absent rows of dq kept", error=WrongAnswer, case=PADDED_QUERIES_ALONE,
        before="{!Config::used_queries || row < sequence.seqlen_q,", after="{true,"),
]  # fmt: skip

keys_bug = partial(Bug, entry="backward_keys_sm90", arch="sm_90a", case=replace(ALONE, id="apart", seqlen_q=333))
PRODUCER_FILLS_Q = """    const SharedAddress q_barrier = shared.q.begin_fill(use);
    tile::copy_tile<kBlockM, Config::head_dim>(shared.q.stage(use), params.q, q_barrier, row, here.head, work.batch);
    arch::copy_bytes_to_shared(shared.row_lse(use), common.row_lse + statistic, kStatisticBytes, q_barrier);
"""
PRODUCER_FILLS_DOUT = """    const SharedAddress dout_barrier = shared.dout.begin_fill(use);
    tile::copy_tile<kBlockM, Config::head_dim_v>(shared.dout.stage(use), params.dout, dout_barrier, row, here.head, \
work.batch);
    arch::copy_bytes_to_shared(shared.row_delta(use), common.row_delta + statistic, kStatisticBytes, dout_barrier);
"""

KEYS_BUGS = [
    keys_bug("probabilities read before they are given", error=TwinError, message=RACE,
        before="arch::named_barrier_sync(kFullBarrier + use % 2, kConsumerThreads);", after=""),
    keys_bug("probabilities of the other buffer", error=TwinError, message=RACE,
        before="kConsumerThreads);\n    const SharedAddress place = shared.probabilities(use);",
        after="kConsumerThreads);\n    const SharedAddress place = shared.probabilities(use + 1);"),
    keys_bug("probabilities given before they are written", error=TwinError, message=RACE,
        before="arch::named_barrier_sync(kEmptyBarrier + use % 2, kConsumerThreads);",
        after="arch::named_barrier_sync(kEmptyBarrier + use % 2, kConsumerThreads);\n"
              "    arch::named_barrier_arrive(kFullBarrier + use % 2, kConsumerThreads);"),
    keys_bug("nobody says that the buffers of probabilities are empty", error=TwinError, message=DEADLOCK,
        before="buffer < 2; ++buffer) arch::named_barrier_arrive",
        after="buffer < 0; ++buffer) arch::named_barrier_arrive"),
    keys_bug("probabilities of another thread", error=TwinError, message=RACE,
        before="kProbabilityBytes + arch::thread_index() % arch::kWarpgroupSize * 16",
        after="kProbabilityBytes + arch::thread_index() / 2 % arch::kWarpgroupSize * 16"),
    keys_bug("statistics of dk and dv not announced", error=TwinError, message=f"{ARRIVING}|{DEADLOCK}",
        before="kDoutBytes, kDoutBytes + kStatisticBytes>", after="kDoutBytes, kDoutBytes>"),
    keys_bug("queries released before dk has read them", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait<1>();\n    arch::pin(dk);", after="arch::pin(dk);"),
    keys_bug("dout released before dv has read it", error=TwinError, message=OVERWRITTEN,
        before="arch::product_wait<1>();\n    arch::pin(dv);", after="arch::pin(dv);"),
    keys_bug("producer fills dout before q", error=TwinError, message=OVERWRITTEN,
        before=PRODUCER_FILLS_Q + PRODUCER_FILLS_DOUT, after=PRODUCER_FILLS_DOUT + PRODUCER_FILLS_Q),
    keys_bug("dv of a dout that is not waited for", error=TwinError, message=f"{RACE}|{ARRIVING}",
        before="    shared.dout.wait_full(use);\n    tile::start_registers", after="    tile::start_registers"),
    keys_bug("dv staged while v is read", error=TwinError, message=OVERWRITTEN,
        before="arch::named_barrier_sync(kValuesReadBarrier, kConsumerThreads);", after=""),
    keys_bug("missing proxy fence before dk and dv are stored", error=TwinError, message=PROXY,
        before="arch::fence_async_proxy();\n  arch::named_barrier_sync(barrier, arch::kWarpgroupSize);",
        after="arch::named_barrier_sync(barrier, arch::kWarpgroupSize);"),
    keys_bug("one barrier for dk and dv", error=TwinError,
        before="work, kStoreBarrier + 1);", after="work, kStoreBarrier);"),
    keys_bug("wrong stride between chunks of dk and dv", error=WrongAnswer,
        before="((c - first_chunk) * kRows + tile_row)", after="((c - first_chunk) * kRows / 2 + tile_row)"),
    keys_bug("dv with dropped probabilities", error=WrongAnswer, case=WIDE_HOLES,
        before="arch::pack_relu<Element>(scores[i], scores[i + 1])",
        after="arch::pack<Element>(arch::absolute(scores[i]), arch::absolute(scores[i + 1]))"),
    keys_bug("dP of dk without holes", error=WrongAnswer, case=WIDE_HOLES,
        before="dp = p[j] < 0.f ? 0.f : dp * common.dropout.scale", after="dp = dp * common.dropout.scale"),
    keys_bug("dropped probabilities negative in dk", error=WrongAnswer, case=WIDE_HOLES,
        before="(Config::dropout ? arch::absolute(p[j]) : p[j])", after="p[j]"),
    keys_bug("softcap of dk without its derivative", error=WrongAnswer, case=WIDE_CAPPED,
        before="if constexpr (Config::softcap) tile::multiply(scores, derivative);", after=""),
    keys_bug("cut scores of dk and dv not masked", error=WrongAnswer, case=CUT,
        before="      band.template select<KeyRows>(scores, -arch::infinity(), query, key);", after=";"),
    keys_bug("absent queries of dk and dv not cleared", error=WrongAnswer, case=PADDED_QUERIES_ALONE,
        before="    absent.template clear<Config::head_dim, kThreads>(q.stage(use));\n", after=""),
    keys_bug("only one warpgroup clears", error=TwinError, message=f"{RACE}|{DEADLOCK}", case=PADDED_QUERIES_ALONE,
        before="shape.seqlen_q, Meet{clear_barrier, clear_barrier + 1});\n\n    float gradients",
        after="sequence.seqlen_q, Meet{clear_barrier, clear_barrier + 1});\n\n    float gradients"),
]  # fmt: skip
