// How many damaged files a test makes.
#pragma once

namespace attune::test {

/// `--cases N`, else 20,000: a second or two.
int cases();

}  // namespace attune::test
