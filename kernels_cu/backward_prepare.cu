// Before the backward: the row sums delta = rowsum(dout * out) - dlse, log-sum-exps in base 2 and, where key blocks add up dq, or
// heads dk and dv, a cleared accumulator for it. One CTA takes block_m rows of one head.
#include "arch/common.cuh"
#include "tile/gradient.cuh"
#include "tile/mask.cuh"
#include "tile/scheduler.cuh"

namespace {

using Element = Config::Element;

constexpr int kBlockM = Config::block_m;
constexpr int kThreads = Config::num_warps * kWarpSize;
constexpr int kRowThreads = Config::head_dim_v >= 128 ? 16 : 8;  // threads that share a row
constexpr int kRowStep = kThreads / kRowThreads;
constexpr int kAtOnce = kBlockM < 4 * kRowStep ? kBlockM / kRowStep : 4;  // rows of a thread whose loads are under way together
static_assert(kBlockM % (kAtOnce * kRowStep) == 0, "threads share the rows evenly");
constexpr int kPieceColumns = Config::load_bytes / 2;
constexpr int kWords = kPieceColumns == 1 ? 1 : kPieceColumns / 2;

constexpr int kPieces = (Config::head_dim_v + kRowThreads * kPieceColumns - 1) / (kRowThreads * kPieceColumns);

// This thread's pieces of a row: `columns` in all, none where the row is absent.
struct Pieces {
  uint32 words[kPieces][kWords];

  DEVICE void load(const char* row, int columns) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kRowThreads + static_cast<uint32>(arch::thread_index()) % kRowThreads) * kPieceColumns;
#pragma unroll
      for (uint32& word : words[i]) word = 0;
      if (column < columns) arch::load_global<Config::load_bytes>(words[i], row + 2 * column);
    }
  }
};

DEVICE float dot(const Pieces& a, const Pieces& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32 word_a = a.words[i][w], word_b = b.words[i][w];
      sum = arch::multiply_add(arch::unpack_low<Element>(word_a), arch::unpack_low<Element>(word_b), sum);
      if (kPieceColumns > 1)
        sum = arch::multiply_add(arch::unpack_high<Element>(word_a), arch::unpack_high<Element>(word_b), sum);
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

  if constexpr (Config::with_dq && !Config::first_stores) tile::DqShare<Config>::clear(params, batch, head, m_block);
  if constexpr (Config::split_groups) {
    const int64 thread = static_cast<int64>(arch::block_index()) * kThreads + arch::thread_index();
    tile::GroupSums<Config>::clear(params, thread, static_cast<int64>(arch::grid_size()) * kThreads);
  }

  const int thread_row = static_cast<uint32>(arch::thread_index()) / kRowThreads;
  const bool leads = arch::thread_index() % kRowThreads == 0;
#pragma unroll 1
  for (int r = thread_row; r < kBlockM; r += kAtOnce * kRowStep) {
    Pieces out[kAtOnce], dout[kAtOnce];
    float lse[kAtOnce], dlse[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first_row + r + i * kRowStep;
      lse[i] = -arch::infinity(), dlse[i] = 0.f;
      if (leads && row < sequence.seqlen_q) {
        const int64 source = tile::statistic_offset(shape, batch, head, shape.seqlen_q, row);
        lse[i] = params.lse[source];
        if (params.dlse != nullptr) dlse[i] = params.dlse[source];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first_row + r + i * kRowStep;
      const int columns = row < sequence.seqlen_q ? shape.head_dim_v : 0;
      out[i].load(out_rows.row(row), columns);
      dout[i].load(dout_rows.row(row), columns);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float delta = dot(out[i], dout[i]);
#pragma unroll
      for (int distance = kRowThreads / 2; distance > 0; distance /= 2) delta += arch::shuffle_xor(delta, distance);
      if (leads) {
        const int64 destination =
            tile::statistic_offset(shape, batch, head, params.padded_seqlen_q, first_row + r + i * kRowStep);
        // A row that sees no key has no probabilities: exp2(score - inf) = 0.
        params.row_lse[destination] = lse[i] == -arch::infinity() ? arch::infinity() : lse[i] * kLog2E;
        params.row_delta[destination] = delta - dlse[i];
      }
    }
  }

  if (params.dq_done != nullptr && arch::thread_index() == 0 && m_block == 0) {
    tile::tiles_done(params)[batch * shape.num_heads + head] = 0;
    if (arch::block_index() == 0) *tile::parts_taken(params) = 0;
  }
  if constexpr (Config::with_dq && Config::deterministic) {
    if (arch::thread_index() == 0) {
      const tile::Band<Config> band(shape, sequence);
      *tile::turn_of<Config>(params, batch, head, m_block) = band.template first_key_block<Config::block_n>(first_row);
    }
  }
  if constexpr (Config::first_stores) {
    if (arch::thread_index() == 0) *tile::turn_of<Config>(params, batch, head, m_block) = 0;
  }
}
