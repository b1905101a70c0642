#include "codegen/candidates.h"
#include "codegen/names.h"
#include "runtime/cuda/cuda_backend.h"
#include "tools/attend.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace attune::tools {

Result<Calls> time_calls(const AttendOptions& options, Device device, const std::function<void()>& call) {
  const auto timed_call = [&]() -> Result<double> {
    const auto begin = std::chrono::steady_clock::now();
    call();
    if (device.type == DeviceType::cuda) ATTUNE_TRY(runtime::cuda_synchronize(device.index));
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  };
  Calls calls;
  const Counters before = counters();
  ATTUNE_ASSIGN(first_call_ms, timed_call());
  const Counters after = counters();
  calls.first_call_ms = first_call_ms;
  if (after.launches > before.launches) calls.kernel = last_kernel();
  calls.compiles = after.compiles - before.compiles;
  calls.cache_hits = after.cache_hits - before.cache_hits;
  calls.cache_defects = after.cache_defects - before.cache_defects;
  std::vector<double> hot_calls;
  for (int i = 0; i < options.repeat; ++i) {
    ATTUNE_ASSIGN(call_ms, timed_call());
    hot_calls.push_back(call_ms);
  }
  const auto middle = hot_calls.begin() + static_cast<std::ptrdiff_t>(hot_calls.size() / 2);
  std::ranges::nth_element(hot_calls, middle);
  calls.hot_call_ms = *middle;
  return calls;
}

const char* Calls::source() const {
  if (kernel.empty()) return "none";
  if (compiles > 0) return "compiler";
  return cache_hits > 0 ? "disk" : "memory";
}

std::string Calls::family() const {
  for (const codegen::Candidate& candidate : codegen::candidates()) {
    if (kernel == candidate.name) return std::string(codegen::name_of(candidate.family));
  }
  return "none";
}

}  // namespace attune::tools
