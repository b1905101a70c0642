#include "cache/remote.h"

#include "runtime/engine.h"

#include <doctest/doctest.h>

#include <stdlib.h>

namespace attune::cache {
namespace {

using namespace std::chrono_literals;

constexpr Breaker::Time kStart{1000h};

/// A breaker that has just gone off.
struct Off {
  Breaker breaker;
  Off() {
    for (int i = 1; i < Breaker::kFailures; ++i) {
      CHECK_FALSE(breaker.failed(kStart));
      CHECK(breaker.allows(kStart));
    }
    CHECK(breaker.failed(kStart));
  }
};

TEST_CASE("failures in a row turn it off for a pause, then one caller may try") {
  Off f;
  CHECK_FALSE(f.breaker.allows(kStart));
  CHECK_FALSE(f.breaker.allows(kStart + Breaker::kPause - 1ns));
  const Breaker::Time later = kStart + Breaker::kPause;
  CHECK(f.breaker.allows(later));
  CHECK_FALSE(f.breaker.allows(later));
  SUBCASE("a success turns it on") {
    f.breaker.succeeded();
    CHECK(f.breaker.allows(later));
    CHECK_FALSE(f.breaker.failed(later));  // counted from the start again
    CHECK(f.breaker.allows(later));
  }
  SUBCASE("a failure turns it off again, from then on") {
    CHECK(f.breaker.failed(later + 2s));
    CHECK_FALSE(f.breaker.allows(later + Breaker::kPause));
    CHECK(f.breaker.allows(later + 2s + Breaker::kPause));
  }
  SUBCASE("one who never tells how it went costs a pause") {
    CHECK_FALSE(f.breaker.allows(later + Breaker::kPause - 1ns));
    CHECK(f.breaker.allows(later + Breaker::kPause));
  }
}

TEST_CASE("a success between failures starts the count again") {
  Breaker breaker;
  for (int i = 0; i < 10; ++i) {
    for (int failure = 1; failure < Breaker::kFailures; ++failure) CHECK_FALSE(breaker.failed(kStart));
    breaker.succeeded();
  }
  CHECK(breaker.allows(kStart));
}

/// What the engine makes of the two variables: "URL mode", "none", or the error.
std::string parsed(const char* url, const char* mode) {
  REQUIRE(::setenv("ATTUNE_REMOTE", url, 1) == 0);
  REQUIRE(::setenv("ATTUNE_REMOTE_MODE", mode, 1) == 0);
  const auto options = runtime::EngineOptions::from_environment();
  REQUIRE(::unsetenv("ATTUNE_REMOTE") == 0);
  REQUIRE(::unsetenv("ATTUNE_REMOTE_MODE") == 0);
  if (!options.ok()) {
    CHECK(options.failure().kind == ErrorKind::invalid_argument);
    return options.failure().message;
  }
  if (!options->remote) return "none";
  return options->remote->url + (options->remote->writable ? " rw" : " ro");
}

TEST_CASE("the remote is off by default, and only read unless told otherwise") {
  CHECK(parsed("", "") == "none");
  CHECK(parsed("", "rw") == "none");
  CHECK(parsed("http://cache:8080/ac", "") == "http://cache:8080/ac ro");
  CHECK(parsed("https://cache/kernels//", "ro") == "https://cache/kernels ro");
  CHECK(parsed("http://cache/", "rw") == "http://cache rw");
}

TEST_CASE("what is no URL of http or no mode is an error that names the choices") {
  for (const char* url : {"cache:8080", "ftp://cache/", "file:///etc", "HTTP://cache", "http:/cache",
                          "http://", "https:///", " http://cache"}) {
    CHECK(parsed(url, "") == std::string("ATTUNE_REMOTE=") + url + ": expected http://HOST or https://HOST");
  }
  CHECK(parsed("http://cache", "on") == "ATTUNE_REMOTE_MODE=on: expected one of ro, rw");
  CHECK(parsed("", "RW") == "ATTUNE_REMOTE_MODE=RW: expected one of ro, rw");
}

}  // namespace
}  // namespace attune::cache
