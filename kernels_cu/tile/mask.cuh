// Which scores of a tile are visible, and which tiles hold a visible score at all. Definitions: cuflash/masks.py.
#pragma once

#include "tile/fragment.cuh"
#include "tile/sequence.cuh"

namespace tile {

DEVICE int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
DEVICE int ceil_divide(int a, int b) { return -floor_divide(-a, b); }

struct Range {
  int begin;
  int end;
};

// The band of visible keys: -left <= key - query - offset <= right, and key < seqlen_k.
template <class Config>
struct Band {
  int seqlen_q;
  int seqlen_k;
  int offset;
  int left;
  int right;

  DEVICE Band(const Shape& shape, const Sequence& sequence)
      : seqlen_q(sequence.seqlen_q),
        seqlen_k(sequence.seqlen_k),
        offset(sequence.offset),
        left(shape.window_left),
        right(shape.window_right) {}

  // Key blocks that hold a visible key of some query in [query, query + kQueries).
  template <int kQueries, int kKeys>
  DEVICE Range key_blocks(int query) const {
    const int last_query = min(query + kQueries, seqlen_q) - 1;
    int begin = 0, end = seqlen_k;
    if constexpr (Config::window_left) begin = max(0, query + offset - left);
    if constexpr (Config::window_right) end = min(end, last_query + offset + right + 1);
    if (last_query < query || end <= begin) return {0, 0};
    return {begin / kKeys, ceil_divide(end, kKeys)};
  }

  // Key blocks that every query in [query, query + kQueries) sees whole; may be empty, or end before it begins.
  template <int kQueries, int kKeys>
  DEVICE Range whole_blocks(int query) const {
    int begin = 0, end = seqlen_k;
    if constexpr (Config::window_left) begin = max(0, query + kQueries - 1 + offset - left);
    if constexpr (Config::window_right) end = min(end, query + offset + right + 1);
    return {ceil_divide(begin, kKeys), floor_divide(end, kKeys)};
  }

  // Query blocks that hold a query which sees some key in [key, key + kKeys).
  template <int kQueries, int kKeys>
  DEVICE Range query_blocks(int key) const {
    const int last_key = min(key + kKeys, seqlen_k) - 1;
    int begin = 0, end = seqlen_q;
    if constexpr (Config::window_right) begin = max(0, key - offset - right);
    if constexpr (Config::window_left) end = min(end, last_key - offset + left + 1);
    if (last_key < key || end <= begin) return {0, 0};
    return {begin / kQueries, ceil_divide(end, kQueries)};
  }

  // First key block whose query_blocks hold the block that starts at `query`.
  template <int kKeys>
  DEVICE int first_key_block(int query) const {
    if constexpr (!Config::window_left) return 0;
    return max(0, floor_divide(query + offset - left, kKeys));
  }

  // Whether a tile of scores holds a pair that is not visible (rows past seqlen_q do not count: they are discarded as rows).
  template <int kQueries, int kKeys>
  DEVICE bool cuts(int query, int key) const {
    bool cut = key + kKeys > seqlen_k;
    if constexpr (Config::window_right) cut |= key + kKeys - 1 > query + offset + right;
    if constexpr (Config::window_left) cut |= key < query + kQueries - 1 + offset - left;
    return cut;
  }

  // Replaces the invisible elements of a slab whose first score is (query, key).
  template <class Orientation, int kSize>
  DEVICE void select(float (&slab)[kSize], float fill, int query, int key) const {
    const int lane_key = key + Orientation::lane_key();
    const int diagonal = lane_key - (query + Orientation::lane_query()) - offset;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int distance = Orientation::key(i) - Orientation::query(i);  // compares with a bound that holds for the whole slab
      bool visible = Orientation::key(i) < seqlen_k - lane_key;
      if constexpr (Config::window_right) visible &= distance <= right - diagonal;
      if constexpr (Config::window_left) visible &= distance >= -left - diagonal;
      slab[i] = visible ? slab[i] : fill;
    }
  }
};

}  // namespace tile
