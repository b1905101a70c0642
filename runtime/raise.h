// How the public classes refuse: as an exception (ADR 5).
#pragma once

#include "attune/error.h"
#include "base/result.h"

#include <fmt/format.h>

#include <utility>

namespace attune::runtime {

[[noreturn]] inline void raise(const Failure& failure) {
  throw Error(failure.kind, failure.message);
}

/// For arguments that make no sense.
template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) {
  throw Error(ErrorKind::invalid_argument, fmt::format(text, std::forward<Args>(args)...));
}

template <typename T>
T take(Result<T> result) {
  if (!result.ok()) raise(result.failure());
  return std::move(*result);
}

inline void take(const Result<void>& result) {
  if (!result.ok()) raise(result.failure());
}

}  // namespace attune::runtime
