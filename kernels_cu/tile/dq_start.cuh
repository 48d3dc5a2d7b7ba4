// How the float32 sums of dq begin on Hopper, where nobody clears them.
#pragma once

#include "arch/sm90.cuh"
#include "tile/gradient.cuh"
#include "tile/mask.cuh"
#include "tile/scheduler.cuh"

namespace tile {

// Where Config::first_stores, the first key block that a query block sees stores its part of dq, and the others wait for that before
// they add theirs: no accumulator is cleared, nor read from memory before it has anything. CTAs take tiles in the order of their key
// blocks, so whoever is waited for is at work.
template <class Config, class Work>
struct DqStart {
  bool is_mine = false;
  int* begun = nullptr;

  DEVICE DqStart(const BackwardParams& params, const Work& work, const Band<Config>& band, const QueryCursor& here) {
    if constexpr (Config::first_stores) {
      is_mine = band.template first_key_block<Work::kKeys>(here.block * Work::kQueries) == work.n_block;
      begun = turn_of<Config>(params, work.batch, here.head, here.block);
    }
  }
  DEVICE void wait() const {
    if (!Config::first_stores || is_mine) return;
    arch::wait_for_turn(begun, 1);
    arch::fence_async_proxy_global();
  }
  DEVICE void announce() const {
    if (!is_mine) return;
    arch::copy_to_global_wait();
    arch::fence_async_proxy_global();
    arch::pass_turn(begun, 1);
  }
};

}  // namespace tile
