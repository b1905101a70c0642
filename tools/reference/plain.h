// The plain implementation in the tensors' own type: what an eager framework computes, operator by operator,
// each of them rounding its result. How wrong it is, is the yardstick of tolerance.h.
//
//   16 bit:  q' = round(scale * q), s = round(q' k) with a float32 sum, s = round(s + bias) unless the bias
//   is
//            of another type, with which the sum is float32; w = round(softmax(s)) in float32; with dropout
//            w = round(w / (1 - p)) or 0; output = round(w v) with a float32 sum; lse from s in float32
//   float32: the same without the rounding
//
// A merge computes in float32 and rounds the output.
#pragma once

#include "tools/reference/reference.h"

namespace attune::reference {

Values plain_attention(const Inputs& inputs);
Values plain_merge(const MergeInputs& inputs);

}  // namespace attune::reference
