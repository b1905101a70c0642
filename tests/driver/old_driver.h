// A driver that lacks what Attune can do without.
#pragma once

#include "tests/driver/stand_in.h"

#include <set>
#include <string>

namespace attune::test {

/// Do the cases run with such a driver now?
extern bool old_driver;

/// What it lacks: entry points, and cuGetProcAddress to ask for them.
std::set<std::string> optional_entry_points();

}  // namespace attune::test
