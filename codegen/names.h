// The text of every enumerator, both ways; printer, key, parser, explain and JSON share it.
#pragma once

#include "attune/spec.h"
#include "codegen/problem.h"

#include <optional>
#include <string_view>

namespace attune::codegen {

std::string_view name_of(kernel::Operation value);
std::string_view name_of(kernel::Family value);
std::string_view name_of(kernel::DType value);
std::string_view name_of(kernel::Edge value);
std::string_view name_of(kernel::Lse value);
std::string_view name_of(Force value);

/// The C++ spelling of the enumeration's type, for the printed source.
std::string_view type_name_of(kernel::Operation);
std::string_view type_name_of(kernel::Family);
std::string_view type_name_of(kernel::DType);
std::string_view type_name_of(kernel::Edge);
std::string_view type_name_of(kernel::Lse);

bool from_name(std::string_view text, kernel::Operation& value);
bool from_name(std::string_view text, kernel::Family& value);
bool from_name(std::string_view text, kernel::DType& value);
bool from_name(std::string_view text, kernel::Edge& value);
bool from_name(std::string_view text, kernel::Lse& value);
bool from_name(std::string_view text, Force& value);

}  // namespace attune::codegen
