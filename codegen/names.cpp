#include "codegen/names.h"

#include <array>
#include <utility>

namespace attune::codegen {
namespace {

using namespace attune::kernel;

template <typename Enum, std::size_t N>
using Table = std::array<std::pair<Enum, std::string_view>, N>;

constexpr Table<Operation, 1> kOperations{{{Operation::forward, "forward"}}};
constexpr Table<Family, 3> kFamilies{{{Family::cpu, "cpu"}, {Family::simt, "simt"}, {Family::mma, "mma"}}};
constexpr Table<DType, 3> kDTypes{{{DType::f32, "f32"}, {DType::f16, "f16"}, {DType::bf16, "bf16"}}};
constexpr Table<Edge, 2> kEdges{{{Edge::open, "open"}, {Edge::bounded, "bounded"}}};
constexpr Table<Lse, 2> kLses{{{Lse::skip, "skip"}, {Lse::write, "write"}}};
constexpr Table<Force, 4> kForces{
    {{Force::automatic, "automatic"}, {Force::cpu, "cpu"}, {Force::simt, "simt"}, {Force::mma, "mma"}}};

template <typename Enum, std::size_t N>
constexpr std::string_view text_of(const Table<Enum, N>& table, Enum value) {
  for (const auto& [candidate, text] : table) {
    if (candidate == value) return text;
  }
  return "?";
}

template <typename Enum, std::size_t N>
constexpr bool value_of(const Table<Enum, N>& table, std::string_view text, Enum& value) {
  for (const auto& [candidate, name] : table) {
    if (name == text) {
      value = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace

std::string_view name_of(Operation value) {
  return text_of(kOperations, value);
}
std::string_view name_of(Family value) {
  return text_of(kFamilies, value);
}
std::string_view name_of(DType value) {
  return text_of(kDTypes, value);
}
std::string_view name_of(Edge value) {
  return text_of(kEdges, value);
}
std::string_view name_of(Lse value) {
  return text_of(kLses, value);
}
std::string_view name_of(Force value) {
  return text_of(kForces, value);
}

std::string_view type_name_of(Operation) {
  return "Operation";
}
std::string_view type_name_of(Family) {
  return "Family";
}
std::string_view type_name_of(DType) {
  return "DType";
}
std::string_view type_name_of(Edge) {
  return "Edge";
}
std::string_view type_name_of(Lse) {
  return "Lse";
}

bool from_name(std::string_view text, Operation& value) {
  return value_of(kOperations, text, value);
}
bool from_name(std::string_view text, Family& value) {
  return value_of(kFamilies, text, value);
}
bool from_name(std::string_view text, DType& value) {
  return value_of(kDTypes, text, value);
}
bool from_name(std::string_view text, Edge& value) {
  return value_of(kEdges, text, value);
}
bool from_name(std::string_view text, Lse& value) {
  return value_of(kLses, text, value);
}
bool from_name(std::string_view text, Force& value) {
  return value_of(kForces, text, value);
}

}  // namespace attune::codegen
