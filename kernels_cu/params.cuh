// What the host passes to a kernel: one struct by value. cuflash/cuda/launch.py mirrors every struct; a test compares the offsets.
#pragma once

using int64 = long long;
using uint64 = unsigned long long;
using uint32 = unsigned int;

// A (batch, seqlen, heads, head_dim) array; strides in elements, the last axis is contiguous.
struct Rows {
  void* data;
  int64 batch_stride;
  int64 row_stride;
  int64 head_stride;
};

struct Shape {
  const int* used_q;  // (batch,) used lengths, or null
  const int* used_k;
  int batch;
  int num_heads;
  int num_kv_heads;
  int group_size;  // query heads per key/value head
  int seqlen_q;
  int seqlen_k;
  int head_dim;
  int head_dim_v;
  int window_left;  // read only where Config::window_left / window_right say so
  int window_right;
  int top_left;       // 1: the diagonal starts at (0, 0); 0: it ends at the last query and the last key
  int section_heads;  // (batch, head) pairs whose keys and values share the L2 cache: see tile/scheduler.cuh
};

struct Score {
  const float* alibi_slopes;  // (num_heads,) or (batch, num_heads)
  const float* sinks;         // (num_heads,)
  int64 alibi_batch_stride;   // 0 for (num_heads,)
  float scale;                // multiplies q.k
  float softcap;
};

struct DropoutKey {
  uint32 seed_low;
  uint32 seed_high;
  uint32 offset;
  uint32 threshold;  // of 65536; drop where bits < threshold
  float scale;       // 65536 / (65536 - threshold)
};

// What cuTensorMapEncodeTiled writes: a (batch, heads, seqlen, head_dim) array for the copy engine of sm_90.
struct alignas(64) TensorMap {
  uint64 words[16];
};

struct ForwardParams {
  Rows q, k, v, out;
  float* lse;  // (batch, num_heads, seqlen_q), or null
  Shape shape;
  Score score;
  DropoutKey dropout;
};

struct ForwardSm90Params {
  TensorMap q, k, v, out;
  float* lse;         // (batch, num_heads, seqlen_q), or null
  int* tile_counter;  // zero before and after every launch: see tile/pipeline.cuh
  Shape shape;
  Score score;
  DropoutKey dropout;
};

struct BackwardParams {
  Rows q, k, v, out, dout, dq, dk, dv;
  const float* lse;   // (batch, num_heads, seqlen_q), natural logarithm
  const float* dlse;  // the same shape, or null
  float* row_lse;     // (batch, num_heads, padded_seqlen_q), base 2; +inf where a row is empty or absent
  float* row_delta;   // (batch, num_heads, padded_seqlen_q): rowsum(dout * out) - dlse
  float* dq_accum;    // (batch, num_heads, padded_seqlen_q, Config::head_dim) in fragment order
  float* dkv_accum;   // (batch, num_kv_heads, padded_seqlen_k, Config::head_dim + Config::head_dim_v); Config::split_groups only
  float* dsinks;      // (num_heads,), or null
  int* dq_turn;       // (batch, num_heads, num_m_blocks): whose turn it is to add to a dq tile, where Config::deterministic; where
                      // Config::first_stores, 1 once its first key block has stored its part
  int* dq_done;       // (1 + batch * num_heads,), or null: see tile/gradient.cuh
  int* tile_counter;  // zero before and after every launch: see tile/pipeline.cuh; persistent kernels only
  int padded_seqlen_q;
  int padded_seqlen_k;
  int num_tiles;  // key blocks of all key/value heads, or of all query heads where groups are split: what the counter counts
  Shape shape;
  Score score;
  DropoutKey dropout;
};

// The preparation takes the `common` part alone, as do the steps behind the main kernel.
struct BackwardSm90Params {
  TensorMap q, k, v, dout, dk, dv;
  BackwardParams common;
};

// The kernel of dq alone takes all of it, the one of dk and dv the `rest`. Each has maps of its own, with boxes as large as its tiles.
struct BackwardQueriesSm90Params {
  TensorMap q, k, v, dout, dq;
  BackwardSm90Params rest;
};
