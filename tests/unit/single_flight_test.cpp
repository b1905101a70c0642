#include "cache/single_flight.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace attune::cache {
namespace {

using Flight = SingleFlight<int, const std::string>;
using Outcome = Flight::Outcome;

constexpr int kThreads = 8;

/// Holds a flight in the air until all threads are on their way into run(), and then for long enough to get
/// there.
class Boarding {
 public:
  void arrive() { ++arrived_; }
  void wait_for_all() const {
    while (arrived_ < kThreads) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }

 private:
  std::atomic<int> arrived_{0};
};

TEST_CASE("callers at the same time share one call and its value") {
  Flight flight;
  std::atomic<int> calls{0};
  Boarding boarding;
  std::vector<std::shared_ptr<const std::string>> got(kThreads);
  std::vector<std::jthread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      boarding.arrive();
      const auto outcome = flight.run(1, [&]() -> Outcome {
        ++calls;
        boarding.wait_for_all();
        return std::make_shared<const std::string>("kernel");
      });
      if (outcome.ok()) got[t] = *outcome;
    });
  }
  threads.clear();
  CHECK(calls == 1);
  for (const auto& value : got) {
    REQUIRE(value != nullptr);
    CHECK(value == got[0]);
  }
}

TEST_CASE("a child that is forked while a flight is in the air makes its own") {
  Flight flight;
  std::latch begun(1), forked(1);
  std::jthread thread([&] {
    const auto outcome = flight.run(1, [&]() -> Outcome {
      begun.count_down();
      forked.wait();
      return std::make_shared<const std::string>("parent's");
    });
    CHECK(**outcome == "parent's");
  });
  begun.wait();
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);  // a hang is a failure
    const auto own =
        flight.run(1, []() -> Outcome { return std::make_shared<const std::string>("child's"); });
    _exit(own.ok() && **own == "child's" ? 0 : 1);
  }
  forked.count_down();
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("waiters get the whole failure and a later call tries again") {
  Flight flight;
  std::atomic<int> calls{0};
  std::atomic<int> right{0};
  Boarding boarding;
  std::vector<std::jthread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      boarding.arrive();
      const auto outcome = flight.run(1, [&]() -> Outcome {
        ++calls;
        boarding.wait_for_all();
        return unsupported("line 1 of the log\nline 2");
      });
      if (!outcome.ok() && outcome.failure().kind == ErrorKind::unsupported &&
          outcome.failure().message == "line 1 of the log\nline 2") {
        ++right;
      }
      // A waiter that tries again must not meet the failure that it has just got.
      const auto again = flight.run(1, []() -> Outcome { return std::make_shared<const std::string>("ok"); });
      if (again.ok()) ++right;
    });
  }
  threads.clear();
  CHECK(calls == 1);
  CHECK(right == 2 * kThreads);
}

TEST_CASE("nothing is remembered") {
  Flight flight;
  int calls = 0;
  const auto make = [&]() -> Outcome { return std::make_shared<const std::string>(std::to_string(++calls)); };
  CHECK(*flight.run(1, make).value() == "1");
  CHECK(*flight.run(1, make).value() == "2");
}

TEST_CASE("different keys fly in parallel") {
  Flight flight;
  std::latch both(2);  // each call waits for the other one: a common lock would hang here
  const auto make = [&]() -> Outcome {
    both.arrive_and_wait();
    return std::make_shared<const std::string>("x");
  };
  std::jthread other([&] { CHECK(flight.run(1, make).ok()); });
  CHECK(flight.run(2, make).ok());
}

TEST_CASE("an exception reaches every caller and leaves nothing behind") {
  Flight flight;
  std::atomic<int> caught{0};
  Boarding boarding;
  std::vector<std::jthread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      boarding.arrive();
      try {
        (void)flight.run(1, [&]() -> Outcome {
          boarding.wait_for_all();
          throw std::runtime_error("out of memory");
        });
      } catch (const std::runtime_error& error) {
        if (error.what() == std::string("out of memory")) ++caught;
      }
    });
  }
  threads.clear();
  CHECK(caught == kThreads);
  CHECK(flight.run(1, []() -> Outcome { return std::make_shared<const std::string>("ok"); }).ok());
}

}  // namespace
}  // namespace attune::cache
