// Result<T>: a value or a Failure. Floors 0 to 3 return it; the public API turns it into an exception,
// a status code or a Python error.
#pragma once

#include "attune/error.h"

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace attune {

struct Failure {
  ErrorKind kind;
  std::string message;
};

inline Failure invalid_argument(std::string message) {
  return {ErrorKind::invalid_argument, std::move(message)};
}
inline Failure unsupported(std::string message) {
  return {ErrorKind::unsupported, std::move(message)};
}
inline Failure environment_failure(std::string message) {
  return {ErrorKind::environment, std::move(message)};
}
inline Failure internal_failure(std::string message) {
  return {ErrorKind::internal, std::move(message)};
}

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}            // NOLINT: implicit
  Result(Failure failure) : state_(std::in_place_index<1>, std::move(failure)) {}  // NOLINT: implicit

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Failure& failure() const { return std::get<1>(state_); }

 private:
  std::variant<T, Failure> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Failure failure) : failure_(std::move(failure)) {}  // NOLINT: implicit
  bool ok() const { return !failure_; }
  explicit operator bool() const { return ok(); }
  const Failure& failure() const { return *failure_; }

 private:
  std::optional<Failure> failure_;
};

/// The success of a Result<void>.
inline Result<void> done() {
  return {};
}

}  // namespace attune

#define ATTUNE_CONCAT_IMPL(a, b) a##b
#define ATTUNE_CONCAT(a, b) ATTUNE_CONCAT_IMPL(a, b)
/// Returns the failure of `expr` from the enclosing function, if it is one.
#define ATTUNE_TRY(expr)                                       \
  do {                                                         \
    auto attune_result_ = (expr);                              \
    if (!attune_result_.ok()) return attune_result_.failure(); \
  } while (false)
// NOLINTBEGIN(bugprone-macro-parentheses): `var` is declared, and cannot stand in parentheses.
/// Declares `var` with the value of `expr`, or returns its failure from the enclosing function.
#define ATTUNE_ASSIGN(var, expr) ATTUNE_ASSIGN_IMPL(var, expr, ATTUNE_CONCAT(attune_result_, __LINE__))
#define ATTUNE_ASSIGN_IMPL(var, expr, tmp) \
  auto tmp = (expr);                       \
  if (!tmp.ok()) return tmp.failure();     \
  auto var = std::move(tmp).value()
// NOLINTEND(bugprone-macro-parentheses)
