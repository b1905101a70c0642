// The first use of a driver: what it may lack, what it may refuse, and that a refusal is told and not kept.
#include "codegen/arch.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/cuda/driver.h"
#include "tests/driver/old_driver.h"
#include "tests/driver/stand_in.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

using namespace attune;
using namespace attune::test;

namespace {

/// What `body` returns in a process of its own, which has not used the driver yet.
std::string in_child(const std::function<std::string()>& body) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const std::string text = body();
    _exit(write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  close(ends[1]);
  std::string text;
  char part[512];
  for (ssize_t got = 0; (got = read(ends[0], part, sizeof part)) > 0;) text.append(part, part + got);
  close(ends[0]);
  int status = 1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  return text;
}

template <typename T>
std::string text_of(const Result<T>& result) {
  return result.ok() ? "ok" : result.failure().message;
}

std::string opened(int index) {
  return text_of(runtime::cuda_backend(index));
}

std::string opened_on(const stand_in::Machine& machine) {
  return in_child([&] {
    stand_in::machine() = machine;
    return opened(0);
  });
}

stand_in::DeviceTraits device_of(int sm) {
  stand_in::DeviceTraits traits = stand_in::ampere();
  traits.sm = sm;
  return traits;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("a driver that lacks what is required is told of by what it lacks") {
#define ATTUNE_TEST_NAME(name, version) #name,
  for (const char* name : {ATTUNE_CUDA_REQUIRED(ATTUNE_TEST_NAME)}) {
    CHECK(opened_on({.absent = {name}}) == "the CUDA driver libcuda.so.1 lacks " + std::string(name) +
                                               ": install driver 450 (CUDA 11) or later");
  }
#undef ATTUNE_TEST_NAME
}

TEST_CASE("what else a driver may lack is done without") {
  CHECK(opened_on({}) == "ok");
  CHECK(opened_on({.absent = optional_entry_points()}) == "ok");
  for (const std::string& name : optional_entry_points()) {
    CAPTURE(name);
    CHECK(opened_on({.absent = {name}}) == "ok");
  }
}

TEST_CASE("devices that are not there, or older than any kernel") {
  CHECK(opened_on({.devices = {}}) ==
        "initialising the CUDA driver: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected");
  CHECK(in_child([] { return opened(2); }) == "no CUDA device 2: this process sees 2");
  CHECK(in_child([] { return opened(-1); }) == "no CUDA device -1");
  CHECK(opened_on({.devices = {device_of(52)}}) ==
        "no kernels for compute capability 5.2: Attune knows 6.0 to 12.1");
  CHECK(opened_on({.devices = {device_of(60)}}) == "ok");
}

TEST_CASE("a driver older than every NVRTC that Attune knows is told of") {
  const std::string told = in_child([] {
    stand_in::machine().driver_version = 11040;
    return text_of(runtime::nvrtc_compiler(*codegen::cuda_arch(80)));
  });
  CHECK_MESSAGE(has(told, "the CUDA driver is of 11.4"), told);
}

TEST_CASE("a report says what is wrong with one device and lists the others") {
  const std::string told = in_child([] {
    stand_in::machine().devices = {device_of(52), stand_in::hopper()};
    const runtime::CudaReport report = runtime::cuda_report();
    return report.devices.at(0).name + " " + std::to_string(report.devices.at(0).multiprocessors) + "; " +
           report.driver_problem;
  });
  CHECK(told ==
        "Stand-in H200 132; device 0: no kernels for compute capability 5.2: Attune knows 6.0 to 12.1");
}

TEST_CASE("each call that opens a device may fail: that is told, and the next try succeeds") {
  std::vector<std::string> calls;
  {
    const std::string lines = in_child([] {
      const stand_in::Recording recording;
      std::string joined = opened(0);
      for (const std::string& call : recording.calls()) joined += "\n" + call;
      return joined;
    });
    REQUIRE(lines.starts_with("ok\n"));
    for (std::size_t at = lines.find('\n'); at != std::string::npos;) {
      const std::size_t next = lines.find('\n', at + 1);
      calls.push_back(lines.substr(at + 1, next == std::string::npos ? next : next - at - 1));
      at = next;
    }
  }
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const auto nth = std::count(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(i) + 1, calls[i]);
    CAPTURE(calls[i]);
    CAPTURE(nth);
    const std::string told = in_child([&] {
      std::string failed;
      {
        const stand_in::Fault fault(calls[i], CUDA_ERROR_OUT_OF_MEMORY, static_cast<int>(nth));
        failed = opened(0);
      }
      return failed + "; then " + opened(0);
    });
    CHECK_MESSAGE(has(told, ": CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; then ok"), told);
  }
}
