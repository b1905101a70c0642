// What attention is, computed plainly: the yardstick of `attune attend --check`.
#pragma once

#include "runtime/engine.h"

#include <vector>

namespace attune::tools {

struct Answer {
  std::vector<double> output;  // [B, Mq, H, Kv]
  std::vector<double> lse;     // [B, H, Mq]
};

/// softmax(scale * query key^T + bias) value in float64. The call's tensors are in host memory; its outputs
/// are not touched.
Answer reference_attention(const runtime::Call& call);

/// The same steps as a user of the inputs' dtype would write them: every result is rounded to that dtype, and
/// sums are float32. Its error is what no implementation can be blamed for.
Answer plain_attention(const runtime::Call& call);

/// How wrong a result may be when the plain implementation is wrong by `plain_error`: twice that, and four
/// float32 roundings of the largest number that the sums are made of.
double error_bound(double plain_error, double magnitude);

/// The largest finite |x|, at least `floor`.
double largest_magnitude(const std::vector<double>& values, double floor);

/// The largest absolute difference; infinity where only one side is a number. Equal infinities differ by 0,
/// and so do two NaNs.
double max_abs_error(const std::vector<double>& values, const std::vector<double>& expected);

/// Elements of a float32, float16 or bfloat16 array as float64.
std::vector<double> to_double(const void* data, kernel::DType dtype, std::size_t count);

}  // namespace attune::tools
