// What all kinds of cases are judged by.
#pragma once

#include "tools/reference/judge.h"
#include "tools/verify/guarded_tensor.h"

#include <string>
#include <vector>

namespace attune::verify {

/// Which tensor was written where it may not be; "" when none was.
std::string damage_of(const std::vector<Part>& parts);

/// What is wrong with a judged output: a row that sees no key must be exactly 0, as the bound alone would let
/// a small number pass for it.
std::string text_of(const reference::Judgement& judged, const reference::Extents& extents,
                    const reference::Values& reference, const std::vector<double>& output);

/// What is wrong with a gradient: an element that nothing flows to must be exactly 0.
std::string text_of(const reference::Gradient& plain, const reference::Gradient& reference,
                    const std::vector<double>& gradient);

}  // namespace attune::verify
