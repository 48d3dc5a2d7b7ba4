// Which tile a CTA works on. Grids are one-dimensional: grid dimensions y and z are limited to 65535.
#pragma once

#include "tile/mask.cuh"
#include "tile/sequence.cuh"

namespace tile {

struct TileIndex {
  int block;
  int head;
  int batch;
};

// Blocks of one head after another: CTAs that run together share that head's keys and values in L2.
DEVICE TileIndex head_after_head(int index, int num_blocks, int num_heads) {
  const int pair = index / num_blocks;
  return {index - pair * num_blocks, pair % num_heads, pair / num_heads};
}

// Tiles of unequal length, longest first, so that the last CTAs to start are the shortest. Block 0 is the longest. Sections of
// heads whose keys and values fit in L2 together are worked on one after another.
DEVICE TileIndex longest_first(int index, int num_blocks, int num_heads, int batch, int section_heads) {
  const int section = index / (section_heads * num_blocks);
  const int first_pair = section * section_heads;
  const int pairs = min(section_heads, batch * num_heads - first_pair);
  const int position = index - first_pair * num_blocks;
  const int pair = first_pair + position % pairs;
  return {position / pairs, pair % num_heads, pair / num_heads};
}

// The query block of a CTA or of a turn in a queue: under a causal mask the last queries see the most keys.
template <class Config>
DEVICE TileIndex query_tile_of(const Shape& shape, int index, int block_m, int num_heads, int section_heads) {
  const int num_blocks = ceil_divide(shape.seqlen_q, block_m);
  if constexpr (Config::window_right) {
    const TileIndex at = longest_first(index, num_blocks, num_heads, shape.batch, section_heads);
    return {num_blocks - 1 - at.block, at.head, at.batch};
  } else {
    return head_after_head(index, num_blocks, num_heads);
  }
}

// Where the backward's work on a key block is.
struct QueryCursor {
  int head;
  int block;
};

// What a CTA does for the keys of a block: all warps go through the query blocks in the same order, from the last to the first, and
// through the heads of the group for each. Under a causal mask key blocks begin together and end one after another, so in this order
// CTAs of one key/value head stay in step, and a query block is in L2 when the others want it; head after head they would drift apart.
// A later key block never reaches a query block before an earlier one does, which the turns of dq rely on.
// Where groups are split, every query head has CTAs of its own, which add to the dk and dv that the heads of a group share.
template <class Config, int kBlockM, int kBlockN, bool kSplitGroups = false>
struct KeyWork {
  static constexpr int kQueries = kBlockM, kKeys = kBlockN;  // of a block

  int n_block, kv_head, batch;
  Range blocks;
  int first_head, end_head;

  DEVICE KeyWork(const Shape& shape, int index) {
    const TileIndex at = tile_of(shape, index);
    n_block = at.block, kv_head = kv_head_of(shape, at), batch = at.batch;
    const Band<Config> band(shape, Sequence(shape, batch));
    blocks = band.template query_blocks<kBlockM, kBlockN>(n_block * kBlockN);
    first_head = at.head * heads_of_tile(shape);
    end_head = first_head + heads_of_tile(shape);
  }

  // Under a causal mask the first keys are seen by the most rows.
  DEVICE static TileIndex tile_of(const Shape& shape, int index) {
    const int num_blocks = ceil_divide(shape.seqlen_k, kBlockN);
    if constexpr (Config::window_right)
      return longest_first(index, num_blocks, num_heads(shape), shape.batch, shape.section_heads);
    return head_after_head(index, num_blocks, num_heads(shape));
  }
  // Heads that have tiles of their own, and query heads of such a tile.
  DEVICE static int num_heads(const Shape& shape) { return kSplitGroups ? shape.num_heads : shape.num_kv_heads; }
  DEVICE static int heads_of_tile(const Shape& shape) { return kSplitGroups ? 1 : shape.group_size; }

  DEVICE static int kv_head_of(const Shape& shape, const TileIndex& at) {
    return kSplitGroups ? at.head / shape.group_size : at.head;
  }

  DEVICE bool is_empty() const { return blocks.begin == blocks.end; }
  DEVICE QueryCursor first() const { return {first_head, blocks.end - 1}; }
  DEVICE QueryCursor next(const QueryCursor& at) const {
    if constexpr (kSplitGroups) return {at.head, at.block - 1};
    return at.head + 1 < end_head ? QueryCursor{at.head + 1, at.block} : QueryCursor{first_head, at.block - 1};
  }
  DEVICE bool has(const QueryCursor& at) const { return at.block >= blocks.begin; }
};

}  // namespace tile
