// After a backward whose groups were split: the float32 sums of dk and dv, scaled, to the element type. One CTA takes block_n keys of
// one key/value head.
#include "arch/common.cuh"
#include "tile/gradient.cuh"
#include "tile/scheduler.cuh"

namespace {

using Element = Config::Element;
using Sums = tile::GroupSums<Config>;

constexpr int kThreads = Config::num_warps * kWarpSize;
constexpr int kPiece = 8;  // columns that a thread converts at a time: 16 bytes
constexpr int kRowPieces = Sums::kColumns / kPiece;
constexpr int kRowStep = kThreads / kRowPieces;
static_assert(kThreads % kRowPieces == 0 && Config::block_n % kRowStep == 0, "threads share the rows evenly");

}  // namespace

KERNEL(kThreads, 1) backward_finish_groups(GRID_CONSTANT BackwardParams params) {
  const Shape& shape = params.shape;
  const auto [n_block, kv_head, batch] =
      tile::head_after_head(arch::block_index(), params.padded_seqlen_k / Config::block_n, shape.num_kv_heads);
  const uint32 thread = arch::thread_index();
  const int place = thread % kRowPieces * kPiece;  // in the row of both gradients
  const bool is_dk = place < Config::head_dim;
  const int column = is_dk ? place : place - Config::head_dim;
  if (column >= (is_dk ? shape.head_dim : shape.head_dim_v)) return;
  const float factor = is_dk ? params.score.scale : Config::dropout ? params.dropout.scale : 1.f;
  const tile::HeadRows<Element> rows(is_dk ? params.dk : params.dv, batch, kv_head);
  const int end = min(shape.seqlen_k, (n_block + 1) * Config::block_n);
#pragma unroll 4
  for (int key = n_block * Config::block_n + thread / kRowPieces; key < end; key += kRowStep) {
    const float4* sums = reinterpret_cast<const float4*>(Sums::row(params, batch, kv_head, key) + place);
    const float4 low = sums[0], high = sums[1];
    const uint32 words[4] = {
        arch::pack<Element>(low.x * factor, low.y * factor), arch::pack<Element>(low.z * factor, low.w * factor),
        arch::pack<Element>(high.x * factor, high.y * factor), arch::pack<Element>(high.z * factor, high.w * factor)};
    arch::store_global(rows.row(key) + 2 * column, words);
  }
}
