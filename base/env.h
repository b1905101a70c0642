// Environment variables: the one place that reads them, the one list of their names (docs/environment.md).
#pragma once

#include <optional>
#include <span>
#include <string>

namespace attune {

struct EnvVariable {
  const char* name;
  const char* values;  // "rw|ro|off|refresh"
  const char* effect;
  const char* fallback;  // what happens without it
  const char* read_in;   // the source file that asks for it
};

/// Every variable that Attune reads; the docs test compares docs/environment.md with it.
std::span<const EnvVariable> env_variables();

/// The value, or nothing when unset or empty. Reads nothing in a set-uid process.
std::optional<std::string> env(const char* name);

}  // namespace attune
