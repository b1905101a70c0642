// The plain implementation in the tensors' own type: what an eager framework computes, operator by operator,
// each of them rounding its result. How wrong it is, is the yardstick of tolerance.h.
//
//   16 bit:  q' = round(scale * q), s = round(q' k) with a float32 sum, s = round(s + bias) unless the bias
//            is of another type, with which the sum is float32; w = round(softmax(s)) in float32; with
//            dropout w = round(w / (1 - p)) or 0; output = round(w v) with a float32 sum; lse from s in
//            float32
//   float32: the same without the rounding
//
// A merge computes in float32 and rounds the output.
//
// Backward, from the same w and, before dropout, p = round(softmax(s)):
//
//   16 bit:  dO = round(grad_output); delta = dO output - grad_lse with a float32 sum; dV = round(w^T dO);
//            dP = round(dO v), with dropout dP = round(dP / (1 - p)) or 0; dS = round(p (dP - delta));
//            dBias = round(dS), summed up over what the bias was broadcast over; dK = round(dS^T q');
//            dQ = round(scale * round(dS k)); all sums float32. A bias of another type leaves p and dS
//            float32; dS is rounded for the products with q' and k.
//   float32: the same without the rounding
//
// An eager framework takes delta from p and dP, which it has kept. A backward pass that is given the output
// takes it from there, as the reference does. Sums over queries, heads and sequences that share a key or an
// element of the bias are rounded once, at their end.
#pragma once

#include "tools/reference/reference.h"

namespace attune::reference {

Values plain_attention(const Inputs& inputs);
Values plain_merge(const MergeInputs& inputs);
GradientValues plain_backward(const BackwardInputs& inputs);

}  // namespace attune::reference
