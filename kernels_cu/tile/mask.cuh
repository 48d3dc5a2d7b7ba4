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

  // Replaces the invisible elements of a slab whose first score is (query, key). What a row of the slab shows is a range of its
  // columns, so that an element costs one comparison for each end of the range that the band has.
  template <class Orientation, int kSize>
  DEVICE void select(float (&slab)[kSize], float fill, int query, int key) const {
    constexpr bool kBegins = Orientation::kQueryRows ? Config::window_left : Config::window_right;
    constexpr bool kEnds = Orientation::kQueryRows || Config::window_left || !Config::window_right;
    const int lane_key = key + Orientation::lane_key();
    const int diagonal = lane_key - (query + Orientation::lane_query()) - offset;
    const Range visible[2] = {columns<Orientation>(0, lane_key, diagonal), columns<Orientation>(8, lane_key, diagonal)};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Range& range = visible[slab_row(i) / 8];
      bool inside = true;
      if constexpr (kBegins) inside &= slab_column(i) >= range.begin;
      if constexpr (kEnds) inside &= slab_column(i) < range.end;
      slab[i] = inside ? slab[i] : fill;
    }
  }

 private:
  // Visible columns of the thread's slab row 0 or 8; `diagonal` is key - query - offset at the thread's first element.
  template <class Orientation>
  DEVICE Range columns(int row, int lane_key, int diagonal) const {
    constexpr int kUnbounded = 1 << 30;
    Range range = {-kUnbounded, kUnbounded};
    if constexpr (Orientation::kQueryRows) {
      range.end = seqlen_k - lane_key;
      if constexpr (Config::window_right) range.end = min(range.end, right - diagonal + row + 1);
      if constexpr (Config::window_left) range.begin = row - left - diagonal;
    } else {
      const bool absent = row >= seqlen_k - lane_key;
      if constexpr (Config::window_right) range.begin = absent ? kUnbounded : row - right + diagonal;
      if constexpr (Config::window_left) range.end = row + left + diagonal + 1;
      if constexpr (!Config::window_right) range.end = absent ? -kUnbounded : range.end;
    }
    return range;
  }
};

}  // namespace tile
