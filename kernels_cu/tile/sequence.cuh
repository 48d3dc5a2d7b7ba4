// Where the rows of a sequence are and how many of them take part. The only place that turns a row number into an address,
// so that other layouts (variable length, pages) change this file and no kernel's loop.
#pragma once

#include "arch/common.cuh"

namespace tile {

// The rows of one head of one sequence. Offsets are 64-bit: an array may hold more than 2^31 elements.
template <class Element>
struct HeadRows {
  char* first_row;
  int64 row_bytes;

  DEVICE HeadRows(const Rows& rows, int batch, int head)
      : first_row(static_cast<char*>(rows.data) + 2 * (batch * rows.batch_stride + head * rows.head_stride)),
        row_bytes(2 * rows.row_stride) {}

  DEVICE char* row(int index) const { return first_row + index * row_bytes; }
};

// Lengths in use, and the column of the diagonal in row 0 (cuflash/masks.py: Mask.offset).
struct Sequence {
  int seqlen_q;
  int seqlen_k;
  int offset;

  DEVICE Sequence(const Shape& shape, int batch)
      : seqlen_q(shape.used_q ? shape.used_q[batch] : shape.seqlen_q),
        seqlen_k(shape.used_k ? shape.used_k[batch] : shape.seqlen_k),
        offset(shape.top_left ? 0 : seqlen_k - seqlen_q) {}
};

// First element of row `row` of a per-row statistic of shape (batch, num_heads, seqlen). Heads of all sequences, like tiles, are
// counted in 32 bits.
DEVICE int64 statistic_offset(const Shape& shape, int batch, int head, int seqlen, int row) {
  return static_cast<int64>(batch * shape.num_heads + head) * seqlen + row;
}

}  // namespace tile
