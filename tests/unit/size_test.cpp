#include "base/size.h"

#include <doctest/doctest.h>

#include <initializer_list>

namespace attune {
namespace {

TEST_CASE("a size is bytes, or a power of 1024") {
  CHECK(*parse_size("0") == 0);
  CHECK(*parse_size("17") == 17);
  CHECK(*parse_size("3K") == 3072);
  CHECK(*parse_size("500M") == 500u << 20);
  CHECK(*parse_size("2G") == 2147483648u);
  CHECK(*parse_size("2GiB") == 2147483648u);
  CHECK(*parse_size("1T") == std::uint64_t{1} << 40);
  CHECK(*parse_size("18446744073709551615") == ~std::uint64_t{0});
}

TEST_CASE("anything else is refused") {
  for (const char* text : {"", "G", "-1", "+1", " 1", "1 G", "1GB", "1iB", "1Gi", "1GiBs", "1KM", "1g",
                           "1.5G", "0x10", "lots", "18446744073709551616", "16777216T"}) {
    CAPTURE(text);
    const auto size = parse_size(text);
    REQUIRE_FALSE(size.ok());
    CHECK(size.failure().message == std::string(text) + ": expected a size such as 500M or 2G");
  }
  CHECK(parse_size("16777215T").ok());
}

}  // namespace
}  // namespace attune
