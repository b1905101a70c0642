// What can go wrong, by whose fault it is. Used by every floor and by callers.
#pragma once

#include <stdexcept>
#include <string>

namespace attune {

enum class ErrorKind {
  invalid_argument,  ///< The call makes no sense: fix the call.
  unsupported,       ///< The call makes sense, but no kernel does it here: change dtype, device or shape.
  environment,       ///< Driver, compiler or disk: fix the machine. `attune doctor` says how.
  internal,          ///< A defect of Attune: please report it.
};

/// The one exception type that the C++ API throws. `what()` says what, where and what to try.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace attune
