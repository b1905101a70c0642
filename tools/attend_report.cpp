#include "tools/attend.h"
#include "tools/console.h"
#include "tools/device_option.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace attune::tools {

reference::Inputs reference_inputs(const Attend& attend) {
  return {.query = attend.host.query.view(),
          .key = attend.host.key.view(),
          .value = attend.host.value.view(),
          .bias = attend.host.with(attend.mask),
          .scale = attend.attention.scale,
          .p = attend.attention.p,
          .dropout = attend.attention.dropout,
          .output_dtype = attend.attention.output_dtype};
}

nlohmann::json report_json(const Attend& attend, const Calls& calls) {
  return {{"kernel", calls.kernel},
          {"family", calls.family()},
          {"source", calls.source()},
          {"device", to_text(attend.device)},
          {"first_call_ms", calls.first_call_ms},
          {"hot_call_ms", calls.hot_call_ms},
          {"compiles", calls.compiles},
          {"cache_hits", calls.cache_hits},
          {"cache_defects", calls.cache_defects}};
}

void add_calls(Table& table, const Attend& attend, const Calls& calls) {
  table.row({"kernel", calls.kernel.empty() ? "none: the output is empty"
                                            : fmt::format("{} (from {})", calls.kernel, calls.source())});
  table.row({"device", to_text(attend.device)});
  table.row({"first call", fmt::format("{:.2f} ms", calls.first_call_ms)});
  table.row({"hot call", fmt::format("{:.3f} ms (median of {})", calls.hot_call_ms, attend.options.repeat)});
}

void add_error(Table& table, const std::string& name, const reference::Comparison& error) {
  table.row({name, fmt::format("{:.2e} (a plain implementation: {:.2e})", error.worst, error.worst_plain)});
}

void add_verdict(Table& table, bool good) {
  table.row(
      {"check", good ? paint("ok", Colour::green, Stream::out) : paint("WRONG", Colour::red, Stream::out)});
}

}  // namespace attune::tools
