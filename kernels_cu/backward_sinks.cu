// The gradient of the sinks: dsinks[h] = -sum over batch and rows of exp(sink - lse) * delta. One CTA per head, in a fixed order.
#include "arch/common.cuh"
#include "tile/sequence.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

}  // namespace

KERNEL(kThreads, 1) backward_sinks(GRID_CONSTANT BackwardParams params) {
  const Shape& shape = params.shape;
  const int head = arch::block_index();
  const float sink = params.score.sinks[head] * kLog2E;
  float sum = 0.f;
  for (int batch = 0; batch < shape.batch; ++batch) {
    const int64 first = tile::statistic_offset(shape, batch, head, params.padded_seqlen_q, 0);
    const int present_rows = tile::Sequence(shape, batch).seqlen_q;
    for (int row = arch::thread_index(); row < present_rows; row += kThreads)
      sum -= arch::exp2(sink - params.row_lse[first + row]) * params.row_delta[first + row];
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += arch::shuffle_xor(sum, distance);
  const SharedAddress partial = arch::shared_base();
  if (arch::lane_index() == 0) arch::store_shared(partial + 4 * arch::warp_index(), sum);
  arch::block_barrier();
  if (arch::thread_index() == 0) {
    float total = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) total += arch::load_shared_float(partial + 4 * warp);
    params.dsinks[head] = total;
  }
}
