// The plain implementation in the tensors' own type: what an eager framework computes, operator by operator,
// each of them rounding its result. How wrong it is, is the yardstick of tolerance.h.
//
//   16 bit:  q' = round(scale * q), s = round(q' k) with a float32 sum, p = round(softmax(s)) in float32,
//            output = round(p v) with a float32 sum; lse from s in float32
//   float32: the same without the rounding
#pragma once

#include "tools/reference/reference.h"

namespace attune::reference {

Values plain_attention(const Inputs& inputs);

}  // namespace attune::reference
