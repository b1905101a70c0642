// What is printed for people: text from files without what a terminal would obey, times as people write them.
#include "tools/console.h"

#include "tests/support/random.h"

#include <doctest/doctest.h>

#include <string>

using namespace attune;
using tools::Lines;
using tools::parse_age;
using tools::printable;

TEST_CASE("text passes, control characters and bytes that are no UTF-8 are spelled") {
  for (const char* text : {"", "sm_90a", "Grüße, 中文, 🙂", "a\\b"}) CHECK(printable(text) == text);
  CHECK(printable("\x1b[31mred\x1b[0m") == R"(\x1b[31mred\x1b[0m)");
  CHECK(printable("a\r\nb\tc\x7f") == R"(a\x0d\x0ab\x09c\x7f)");
  CHECK(printable(std::string_view("a\0b", 3)) == R"(a\x00b)");
  CHECK(printable("\xc2\x9b"
                  "31m") == R"(\xc2\x9b31m)");                            // C1's own escape
  CHECK(printable("\xc2") == R"(\xc2)");                                  // cut short
  CHECK(printable("\xc0\x9b\xe0\x82\x9b") == R"(\xc0\x9b\xe0\x82\x9b)");  // longer than they need to be
  CHECK(printable("\xff\x80") == R"(\xff\x80)");
}

TEST_CASE("a message keeps its lines") {
  CHECK(printable("one\n\ttwo\x1b\n", Lines::many) == "one\n\ttwo\\x1b\n");
}

TEST_CASE("no bytes at all make it print a control character") {
  test::Random random(test::test_seed());
  for (int i = 0; i < 20000; ++i) {
    std::string bytes;
    for (int length = random.integer(0, 12); length > 0; --length)
      bytes += static_cast<char>(random.integer(0, 255));
    const std::string shown = printable(bytes);
    for (std::size_t j = 0; j < shown.size(); ++j) {
      const auto byte = static_cast<unsigned char>(shown[j]);
      REQUIRE((byte >= 0x20 && byte != 0x7f));
      if (byte == 0xc2) REQUIRE(static_cast<unsigned char>(shown[j + 1]) >= 0xa0);
    }
  }
}

TEST_CASE("ages") {
  for (const auto& [text, seconds] :
       {std::pair{"0", 0}, {"90", 90}, {"90s", 90}, {"5min", 300}, {"3h", 10800}, {"12d", 1036800}}) {
    const auto age = parse_age(text);
    REQUIRE(age.ok());
    CHECK(age->count() == seconds);
  }
  for (const char* text :
       {"", "h", "-1", "1.5h", "3 h", "3w", "12dd", "99999999999999999999", "9999999999d"}) {
    const auto age = parse_age(text);
    REQUIRE_FALSE(age.ok());
    CHECK(age.failure().message.find("expected a time such as 90s, 5min, 3h or 12d") != std::string::npos);
  }
}
