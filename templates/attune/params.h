// What a kernel is told at launch. Plain data, passed by value to GPU kernels and by pointer to CPU kernels;
// host and kernels must agree on every byte, so a change here changes the kernels' key (the text is hashed).
#pragma once

#include "attune/hd.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// Strides in elements; the stride of the last axis is 1.
struct Strides {
  i64 batch = 0;
  i64 seq = 0;
  i64 head = 0;
};

struct ForwardParams {
  const void* query = nullptr;  // [batch, len_q, heads, head_dim]
  const void* key = nullptr;    // [batch, len_k, heads, head_dim]
  const void* value = nullptr;  // [batch, len_k, heads, head_dim_v]
  void* output = nullptr;       // [batch, len_q, heads, head_dim_v]
  float* lse = nullptr;         // [batch, heads, len_q], contiguous; null unless the spec writes it
  Strides query_strides;
  Strides key_strides;
  Strides value_strides;
  Strides output_strides;
  i32 batch = 0;
  i32 heads = 0;
  i32 len_q = 0;
  i32 len_k = 0;
  Window window;
  float scale = 1.0f;  // finite, of any sign; scores are scale * q.k
};

}  // namespace attune::kernel
