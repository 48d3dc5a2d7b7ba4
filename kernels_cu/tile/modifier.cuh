// What happens to a score between q.k and the mask. Definitions: cuflash/modifiers.py.
#pragma once

#include "tile/fragment.cuh"

namespace tile {

// Config::scale_first says that scores are scaled before the softmax, because a modifier wants them so or because the scale
// is not positive (the row maximum of unscaled scores would be wrong). Otherwise the scale is folded into the softmax.
// Capped scores are carried as the hyperbolic tangent, without its factor: that, too, is left to the softmax.
template <class Config>
struct Modifier {
  float scale;
  float softcap;
  float tangent_scale;  // the tangent's argument per unit of q.k
  float slope;          // per unit of modified scores

  DEVICE Modifier(const Score& score, int batch, int head)
      : scale(score.scale),
        softcap(score.softcap),
        tangent_scale(Config::softcap ? score.scale * arch::reciprocal(score.softcap) : 0.f),
        slope(Config::alibi ? score.alibi_slopes[batch * score.alibi_batch_stride + head] : 0.f) {
    if constexpr (Config::softcap) slope *= arch::reciprocal(softcap);
  }

  // Base-2 logarithm of a probability per unit of modified score.
  DEVICE float unit() const { return Config::softcap ? softcap * kLog2E : Config::scale_first ? kLog2E : scale * kLog2E; }

  // Scores to hyperbolic tangents, with an absolute error below 2e-6: a score capped at 50 errs by 1e-4. The tanh instruction's
  // 2^-11 would show in the output. Two slow instructions for the tangent beside the softmax's one would double a step's time
  // where head_dim is small, so a warp whose scores are all well below the cap, as they mostly are, takes a polynomial. Its
  // coefficients minimise the largest error up to kNearZero, 1.8e-6 (linear programme over 2000 Chebyshev nodes).
  template <int kSize>
  DEVICE void cap(float (&slab)[kSize]) const {
    if constexpr (Config::softcap) {
      constexpr float kNearZero = 0.6875f;
      constexpr float kFlat = 1e-5f, kSteep = 1e4f;  // seventh powers of other scales leave float32
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < kSize; ++i) largest = arch::maximum(largest, arch::absolute(slab[i]));
      const float steepness = arch::absolute(tangent_scale);
      if (arch::any(largest * steepness > kNearZero || steepness < kFlat || steepness > kSteep)) {
        const float exponent = tangent_scale * (2.f * kLog2E);
#pragma unroll
        for (int i = 0; i < kSize; ++i)  // tanh(x) = 1 - 2 / (1 + e^2x)
          slab[i] = arch::multiply_add(-2.f, arch::reciprocal(1.f + arch::exp2(slab[i] * exponent)), 1.f);
      } else {
        const float a = tangent_scale, a2 = a * a, a3 = a * a2, a5 = a3 * a2, a7 = a5 * a2;
        const float c1 = 0.999975982f * a, c3 = -0.332626816f * a3, c5 = 0.127640837f * a5, c7 = -0.0362094513f * a7;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float y = slab[i] * slab[i];
          slab[i] *= arch::multiply_add(arch::multiply_add(arch::multiply_add(c7, y, c5), y, c3), y, c1);
        }
      }
    }
  }
  // Of the capped score with respect to scale * q.k.
  DEVICE static float derivative(float tangent) { return arch::multiply_add(-tangent, tangent, 1.f); }
  template <int kSize>
  DEVICE static void softcap_derivative(float (&derivatives)[kSize], const float (&tangents)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) derivatives[i] = derivative(tangents[i]);
  }

  // What leaves the derivative as it is: scaling, where the cap has not, and ALiBi. The slab's first score is (query, key);
  // `offset` is the column of the diagonal in row 0. Distances in float32 are exact up to 2^24 and need no conversion of each
  // score's, which exp2's pipe would do; the thread's two rows share them.
  template <class Orientation, int kSize>
  DEVICE void shift(float (&slab)[kSize], int query, int key, int offset) const {
    if constexpr (Config::alibi) {
      const float diagonal = static_cast<float>(query + Orientation::lane_query() + offset - (key + Orientation::lane_key()));
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float distance = arch::absolute(diagonal + static_cast<float>(Orientation::query(i) - Orientation::key(i)));
        slab[i] = Config::softcap ? arch::multiply_add(-slope, distance, slab[i])
                                  : arch::multiply_add(slab[i], scale, -slope * distance);
      }
    } else if constexpr (Config::scale_first && !Config::softcap) {
      multiply(slab, scale);
    }
  }
};

}  // namespace tile
