// What happens to a score between q.k and the mask. Definitions: cuflash/modifiers.py.
#pragma once

#include "tile/fragment.cuh"

namespace tile {

// Config::scale_first says that scores are scaled before the softmax, because a modifier wants them so or because the scale
// is not positive (the row maximum of unscaled scores would be wrong). Otherwise the scale is folded into the softmax.
template <class Config>
struct Modifier {
  float scale;
  float softcap;
  float inverse_softcap;
  float slope;

  DEVICE Modifier(const Score& score, int batch, int head)
      : scale(score.scale),
        softcap(score.softcap),
        inverse_softcap(Config::softcap ? 1.f / score.softcap : 0.f),
        slope(Config::alibi ? score.alibi_slopes[batch * score.alibi_batch_stride + head] : 0.f) {}

  // Base-2 logarithm of a probability per unit of score.
  DEVICE float unit() const { return Config::scale_first ? kLog2E : scale * kLog2E; }

  // tanh(x) = 1 - 2 / (1 + e^2x): absolute error near 1e-7. The tanh instruction's 2^-11 would show in the output.
  DEVICE static float tanh(float x) {
    return 1.f - 2.f * arch::reciprocal(1.f + arch::exp2(x * (2.f * kLog2E)));
  }

  // Scores of a slab whose first score is (query, key); `offset` is the column of the diagonal in row 0.
  template <class Orientation, int kSize>
  DEVICE void apply(float (&slab)[kSize], int query, int key, int offset) const {
    if constexpr (Config::scale_first) {
      const int diagonal = query + Orientation::lane_query() + offset - (key + Orientation::lane_key());
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        slab[i] *= scale;
        if constexpr (Config::softcap) slab[i] = softcap * tanh(slab[i] * inverse_softcap);
        if constexpr (Config::alibi) {
          const int distance = diagonal + Orientation::query(i) - Orientation::key(i);
          slab[i] = arch::multiply_add(-slope, static_cast<float>(abs(distance)), slab[i]);
        }
      }
    }
  }

  // The steps of `apply` by themselves: scaling, the cap with its derivative, and what leaves the derivative as it is.
  template <int kSize>
  DEVICE void scale_first(float (&slab)[kSize]) const {
    if constexpr (Config::scale_first) multiply(slab, scale);
  }
  // Scales, too. The derivative is with respect to scale * q.k.
  template <int kSize>
  DEVICE void cap(float (&slab)[kSize], float (&gradients)[kSize]) const {
    const float factor = scale * inverse_softcap;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float capped = tanh(slab[i] * factor);
      gradients[i] *= arch::multiply_add(-capped, capped, 1.f);
      slab[i] = softcap * capped;
    }
  }
  // Distances in float32 are exact up to 2^24 and need no conversion of each score's, which exp2's pipe would do.
  template <class Orientation, int kSize>
  DEVICE void shift(float (&slab)[kSize], int query, int key, int offset) const {
    if constexpr (Config::alibi) {
      const float diagonal = static_cast<float>(query + Orientation::lane_query() + offset - (key + Orientation::lane_key()));
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float distance = diagonal + static_cast<float>(Orientation::query(i) - Orientation::key(i));
        slab[i] = arch::multiply_add(-slope, arch::absolute(distance), slab[i]);
      }
    }
  }

  // Derivative of each capped score with respect to scale * q.k, from scores that are not modified yet.
  template <int kSize>
  DEVICE void softcap_derivative(float (&derivative)[kSize], const float (&slab)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float capped = tanh(slab[i] * scale * inverse_softcap);
      derivative[i] = 1.f - capped * capped;
    }
  }
};

}  // namespace tile
