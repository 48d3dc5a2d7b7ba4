// Online softmax of the two rows that a thread owns in a slab (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).
//
// Scores stay in the unit in which the product left them; `unit` turns one into a base-2 logarithm, so that
// exp(scale * s - max) costs one multiply-add and one exp2. `unit` is positive: see tile/modifier.cuh.
#pragma once

#include "tile/fragment.cuh"

namespace tile {

struct RowState {
  float maximum[2] = {-arch::infinity(), -arch::infinity()};
  float sum[2] = {0.f, 0.f};  // this thread's columns only, until finish()
};

// exp2 of a row's scores needs a finite reference: a row that has seen no visible key keeps 0, and its scores give exp2(-inf) = 0.
DEVICE float finite_reference(float maximum, float unit) { return maximum == -arch::infinity() ? 0.f : maximum * unit; }

// How far a row's maximum may grow, in base-2 logarithms, before a lazy softmax follows it: probabilities stay below 2^8, and
// rows whose maximum moves little need no rescaling of the output.
constexpr float kLazyGrowth = 8.f;

// Raises the maximum of row r (0 or 1 of the thread's two) to the scores of a slab. `rescale` is what earlier sums and outputs
// shrink by. Returns what exponentiate subtracts.
template <bool kLazy, int kSize>
DEVICE float raise_maximum(const float (&slab)[kSize], int r, RowState& state, float unit, float& rescale) {
  float maximum = state.maximum[r], odd = slab[2 * r + 1];
#pragma unroll
  for (int i = 2 * r; i < kSize; i += 4) { maximum = arch::maximum(maximum, slab[i]); odd = arch::maximum(odd, slab[i + 1]); }
  maximum = row_maximum(arch::maximum(maximum, odd));
  if (kLazy && (maximum - state.maximum[r]) * unit <= kLazyGrowth) maximum = state.maximum[r];

  const float reference = finite_reference(maximum, unit);
  rescale = arch::exp2(arch::multiply_add(state.maximum[r], unit, -reference));
  state.maximum[r] = maximum;
  state.sum[r] *= rescale;
  return reference;
}

// Replaces scores kBegin .. kEnd - 1 of row r, counted along the row, by probabilities relative to the reference.
template <int kBegin, int kEnd, int kSize>
DEVICE void exponentiate(float (&slab)[kSize], int r, RowState& state, float unit, float reference) {
  float odd = 0.f;
#pragma unroll
  for (int e = kBegin; e < kEnd; ++e) {
    const int i = e / 2 * 4 + 2 * r + e % 2;
    slab[i] = arch::exp2(arch::multiply_add(slab[i], unit, -reference));
    if (e % 2) odd += slab[i]; else state.sum[r] += slab[i];
  }
  state.sum[r] += odd;
}

// Both, row after row: scores to probabilities relative to the new maxima.
template <int kSize>
DEVICE void online_softmax(float (&slab)[kSize], RowState& state, float unit, float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float reference = raise_maximum<false>(slab, r, state, unit, rescale[r]);
    exponentiate<0, kSize / 2>(slab, r, state, unit, reference);
  }
}

template <int kSize>
DEVICE void scale_rows(float (&slab)[kSize], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) slab[i] *= factor[(i >> 1) & 1];
}

// The sink of a head joins the denominator, as a key without a value: returns what the outputs so far shrink by.
DEVICE float add_sink(RowState& state, int r, float unit, float sink) {
  const float sink_log2 = sink * kLog2E;
  const float maximum = arch::maximum(state.maximum[r] * unit, sink_log2);
  const float reference = maximum == -arch::infinity() ? 0.f : maximum;
  const float rescale = arch::exp2(state.maximum[r] * unit - reference);
  state.sum[r] = state.sum[r] * rescale + arch::exp2(sink_log2 - reference);
  state.maximum[r] = maximum / unit;
  return rescale;
}

// Natural log-sum-exp of a row; `sum` over the whole row.
DEVICE float log_sum_exp(float maximum, float sum, float unit) {
  return sum == 0.f ? -arch::infinity() : (maximum * unit + arch::log2(sum)) * kLn2;
}

}  // namespace tile
