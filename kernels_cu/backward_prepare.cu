// Before the backward: the row sums delta = rowsum(dout * out) - dlse, log-sum-exps in base 2 and, where key blocks add up dq, a
// cleared accumulator for it. One CTA takes block_m rows of one head.
#include "arch/common.cuh"
#include "tile/gradient.cuh"
#include "tile/mask.cuh"
#include "tile/scheduler.cuh"

namespace {

using Element = Config::Element;

constexpr int kBlockM = Config::block_m;
constexpr int kThreads = Config::num_warps * kWarpSize;
constexpr int kRowThreads = Config::head_dim_v >= 128 ? 16 : 8;  // threads that share a row
constexpr int kPieceColumns = Config::load_bytes / 2;
constexpr int kWords = kPieceColumns == 1 ? 1 : kPieceColumns / 2;

// This thread's part of the product of two rows: `columns` in all, none where the row is absent.
DEVICE float partial_dot(const char* a, const char* b, int columns) {
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < Config::head_dim_v; c += kRowThreads * kPieceColumns) {
    const int column = c + static_cast<uint32>(arch::thread_index()) % kRowThreads * kPieceColumns;
    uint32 words_a[kWords] = {}, words_b[kWords] = {};
    if (column < columns) {
      arch::load_global<Config::load_bytes>(words_a, a + 2 * column);
      arch::load_global<Config::load_bytes>(words_b, b + 2 * column);
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      sum = arch::multiply_add(arch::unpack_low<Element>(words_a[w]), arch::unpack_low<Element>(words_b[w]), sum);
      if (kPieceColumns > 1)
        sum = arch::multiply_add(arch::unpack_high<Element>(words_a[w]), arch::unpack_high<Element>(words_b[w]), sum);
    }
  }
  return sum;
}

}  // namespace

KERNEL(kThreads, 1) backward_prepare(GRID_CONSTANT BackwardParams params) {
  const Shape& shape = params.shape;
  const auto [m_block, head, batch] =
      tile::head_after_head(arch::block_index(), params.padded_seqlen_q / kBlockM, shape.num_heads);
  const tile::Sequence sequence(shape, batch);
  const tile::HeadRows<Element> out_rows(params.out, batch, head), dout_rows(params.dout, batch, head);
  const int first_row = m_block * kBlockM;

  if constexpr (Config::with_dq) tile::DqShare<Config>::clear(params, batch, head, m_block);

#pragma unroll 4
  for (int r = static_cast<uint32>(arch::thread_index()) / kRowThreads; r < kBlockM; r += kThreads / kRowThreads) {
    const int row = first_row + r;
    const bool present = row < sequence.seqlen_q;
    float delta = partial_dot(out_rows.row(row), dout_rows.row(row), present ? shape.head_dim_v : 0);
#pragma unroll
    for (int distance = kRowThreads / 2; distance > 0; distance /= 2) delta += arch::shuffle_xor(delta, distance);
    if (arch::thread_index() % kRowThreads == 0) {
      const int64 source = tile::statistic_offset(shape, batch, head, shape.seqlen_q, row);
      const float lse = present ? params.lse[source] : -arch::infinity();
      if (present && params.dlse != nullptr) delta -= params.dlse[source];
      const int64 destination = tile::statistic_offset(shape, batch, head, params.padded_seqlen_q, row);
      // A row that sees no key has no probabilities: exp2(score - inf) = 0.
      params.row_lse[destination] = lse == -arch::infinity() ? arch::infinity() : lse * kLog2E;
      params.row_delta[destination] = delta;
    }
  }

  if constexpr (Config::with_dq && Config::deterministic) {
    if (arch::thread_index() == 0) {
      const tile::Band<Config> band(shape, sequence);
      *tile::turn_of<Config>(params, batch, head, m_block) = band.template first_key_block<Config::block_n>(first_row);
    }
  }
}
