// Kernels of the benchmarks themselves: the unfused steps of standard attention, one pass over device memory each as a
// framework's own kernels make, and a kernel that only waits.
#include <cuda_fp16.h>

using int64 = long long;
using uint32 = unsigned int;

constexpr int row_threads = 256;
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// Holds the stream while the host enqueues what will be timed.
extern "C" __global__ void hold(int64 cycles) {
  const int64 start = clock64();
  while (clock64() - start < cycles) {
  }
}

// scores (rows, seqlen): hides keys right of the diagonal, row i of each seqlen x seqlen matrix sees keys 0..i.
extern "C" __global__ void mask_causal(__half* scores, int seqlen, int64 size) {
  const int64 index = blockIdx.x * int64(blockDim.x) + threadIdx.x;
  if (index >= size) return;
  const int64 row = index / seqlen;
  if (index - row * seqlen > row % seqlen) scores[index] = __float2half(NEGATIVE_INFINITY);
}

template <typename Combine>
__device__ float reduce_row(float value, float* shared, Combine combine) {
  for (int lane = 16; lane; lane /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < row_threads / 32; ++warp) value = combine(value, shared[warp]);
  return value;
}

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// probs = softmax(scale * scores) along rows of `seqlen`, one block a row.
extern "C" __global__ void softmax_rows(const __half* scores, __half* probs, int seqlen, float scale) {
  __shared__ float shared[row_threads / 32];
  const __half* row = scores + int64(blockIdx.x) * seqlen;
  float row_max = NEGATIVE_INFINITY;
  for (int j = threadIdx.x; j < seqlen; j += row_threads) row_max = fmaxf(row_max, __half2float(row[j]));
  row_max = reduce_row(row_max, shared, Max());
  float row_sum = 0;
  for (int j = threadIdx.x; j < seqlen; j += row_threads) row_sum += expf(scale * (__half2float(row[j]) - row_max));
  row_sum = reduce_row(row_sum, shared, Sum());
  for (int j = threadIdx.x; j < seqlen; j += row_threads)
    probs[int64(blockIdx.x) * seqlen + j] = __float2half(expf(scale * (__half2float(row[j]) - row_max)) / row_sum);
}

// dscores = scale * probs * (dprobs - sum(probs * dprobs)) along rows, one block a row.
extern "C" __global__ void softmax_rows_backward(const __half* probs, const __half* dprobs, __half* dscores, int seqlen,
                                                 float scale) {
  __shared__ float shared[row_threads / 32];
  const int64 start = int64(blockIdx.x) * seqlen;
  float dot = 0;
  for (int j = threadIdx.x; j < seqlen; j += row_threads)
    dot += __half2float(probs[start + j]) * __half2float(dprobs[start + j]);
  dot = reduce_row(dot, shared, Sum());
  for (int j = threadIdx.x; j < seqlen; j += row_threads) {
    const float p = __half2float(probs[start + j]);
    dscores[start + j] = __float2half(scale * p * (__half2float(dprobs[start + j]) - dot));
  }
}

// out = values where kept, scaled, else 0. Keep is a hash of (index, seed): the backward draws the same again.
extern "C" __global__ void dropout(const __half* values, __half* out, uint32 seed, float drop, int64 size) {
  const int64 index = blockIdx.x * int64(blockDim.x) + threadIdx.x;
  if (index >= size) return;
  uint32 bits = uint32(index) ^ (uint32(index >> 32) * 0x9E3779B9u) ^ seed;
  for (int round = 0; round < 3; ++round) {
    bits ^= bits >> 16;
    bits *= 0x85EBCA6Bu;
  }
  bits ^= bits >> 13;
  const bool keep = bits * (1.0f / 4294967296.0f) >= drop;
  out[index] = keep ? __float2half(__half2float(values[index]) / (1 - drop)) : __float2half(0.0f);
}
