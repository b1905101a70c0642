// The text of every enumerator and field, both ways; printer, key, parser, explain and JSON share it.
#pragma once

#include "attune/spec.h"
#include "codegen/arch.h"
#include "codegen/problem.h"

#include <array>
#include <string>
#include <string_view>
#include <type_traits>

namespace attune::codegen {

/// An enumeration whose values count from 0: its C++ type name, and the texts of its values in order.
template <typename Enum>
struct EnumNames;

template <>
struct EnumNames<kernel::Operation> {
  static constexpr std::string_view kType = "Operation";
  static constexpr std::array<std::string_view, 8> kValues{
      "forward", "merge", "delta", "grad_query", "grad_key_value", "grad_bias", "round_query", "grad_merge"};
};
template <>
struct EnumNames<kernel::Family> {
  static constexpr std::string_view kType = "Family";
  static constexpr std::array<std::string_view, 6> kValues{"cpu", "simt", "mma", "sm90", "merge", "rows"};
};
template <>
struct EnumNames<kernel::DType> {
  static constexpr std::string_view kType = "DType";
  static constexpr std::array<std::string_view, 3> kValues{"f32", "f16", "bf16"};
};
template <>
struct EnumNames<kernel::Edge> {
  static constexpr std::string_view kType = "Edge";
  static constexpr std::array<std::string_view, 2> kValues{"open", "bounded"};
};
template <>
struct EnumNames<kernel::Blocks> {
  static constexpr std::string_view kType = "Blocks";
  static constexpr std::array<std::string_view, 2> kValues{"dense", "varlen"};
};
template <>
struct EnumNames<kernel::Keys> {
  static constexpr std::string_view kType = "Keys";
  static constexpr std::array<std::string_view, 2> kValues{"contiguous", "paged"};
};
template <>
struct EnumNames<kernel::Bias> {
  static constexpr std::string_view kType = "Bias";
  static constexpr std::array<std::string_view, 5> kValues{"none", "f32", "f16", "bf16", "boolean"};
};
template <>
struct EnumNames<kernel::Dropout> {
  static constexpr std::string_view kType = "Dropout";
  static constexpr std::array<std::string_view, 2> kValues{"off", "on"};
};
template <>
struct EnumNames<kernel::Lse> {
  static constexpr std::string_view kType = "Lse";
  static constexpr std::array<std::string_view, 2> kValues{"skip", "write"};
};
template <>
struct EnumNames<kernel::QueryGradient> {
  static constexpr std::string_view kType = "QueryGradient";
  static constexpr std::array<std::string_view, 3> kValues{"apart", "atomic", "ordered"};
};
template <>
struct EnumNames<kernel::Split> {
  static constexpr std::string_view kType = "Split";
  static constexpr std::array<std::string_view, 2> kValues{"off", "on"};
};

template <>
struct EnumNames<Extent> {
  static constexpr std::string_view kType = "Extent";
  static constexpr std::array<std::string_view, 3> kValues{"large", "few_queries", "few_tiles"};
};

template <typename Enum>
concept NamedEnum = requires {
  EnumNames<Enum>::kType;
};

template <NamedEnum Enum>
constexpr std::string_view name_of(Enum value) {
  const auto index = static_cast<std::size_t>(value);
  return index < EnumNames<Enum>::kValues.size() ? EnumNames<Enum>::kValues[index] : "?";
}

/// The C++ spelling of the enumeration's type, for the printed source.
template <NamedEnum Enum>
constexpr std::string_view type_name_of(Enum) {
  return EnumNames<Enum>::kType;
}

// ---- The text of a field of a spec or a problem: an enumerator's name, a number, or a set "mma|simt" ----

template <NamedEnum Enum>
std::string text_of(Enum value) {
  return std::string(name_of(value));
}
inline std::string text_of(int value) {
  return std::to_string(value);
}
std::string text_of(Families families);

/// The inverse; false when the text is no value of the field's type.
bool parse_text(std::string_view text, int& value);
bool parse_text(std::string_view text, Families& families);
template <NamedEnum Enum>
bool parse_text(std::string_view text, Enum& value) {
  const auto& values = EnumNames<Enum>::kValues;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] != text) continue;
    value = static_cast<Enum>(i);
    return true;
  }
  return false;
}

}  // namespace attune::codegen
