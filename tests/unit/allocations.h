// Counts what the program takes from the heap by `new`. In a file of its own: compilers and analysers that
// see an operator new beside its uses take the one for the other.
#pragma once

namespace attune::test {

/// Calls of operator new since the program began; always 0 under a sanitizer.
long allocations();

}  // namespace attune::test
