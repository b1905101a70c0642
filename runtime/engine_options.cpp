#include "runtime/engine_options.h"

#include "base/env.h"
#include "base/size.h"
#include "cache/layers.h"

#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <initializer_list>
#include <system_error>
#include <utility>

namespace attune::runtime {
namespace {

template <typename Value>
Result<Value> parse_choice(const char* variable, std::initializer_list<std::pair<const char*, Value>> choices,
                           Value fallback) {
  const auto text = env(variable);
  if (!text) return fallback;
  std::string known;
  for (const auto& [name, value] : choices) {
    if (*text == name) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  return invalid_argument(fmt::format("{}={}: expected one of {}", variable, *text, known));
}

Result<std::uint64_t> parse_max_bytes() {
  const auto text = env("ATTUNE_CACHE_MAX_SIZE");
  if (!text) return cache::kDefaultMaxBytes;
  auto size = parse_size(*text);
  if (!size.ok()) return invalid_argument("ATTUNE_CACHE_MAX_SIZE=" + size.failure().message);
  return size;
}

Result<std::chrono::seconds> parse_compile_limit() {
  const auto text = env("ATTUNE_COMPILE_LIMIT");
  if (!text) return std::chrono::duration_cast<std::chrono::seconds>(CompileChild().limit);
  int seconds = 0;
  const char* const end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, seconds);
  if (error == std::errc() && stop == end && seconds > 0) return std::chrono::seconds(seconds);
  return invalid_argument(fmt::format("ATTUNE_COMPILE_LIMIT={}: expected seconds, 1 or more", *text));
}

}  // namespace

Result<EngineOptions> EngineOptions::from_environment() {
  EngineOptions options;
  options.cache_root = cache::default_root();
  ATTUNE_ASSIGN(mode, parse_choice<cache::Mode>("ATTUNE_CACHE_MODE",
                                                {{"rw", cache::Mode::rw},
                                                 {"ro", cache::Mode::ro},
                                                 {"off", cache::Mode::off},
                                                 {"refresh", cache::Mode::refresh}},
                                                cache::Mode::rw));
  ATTUNE_ASSIGN(jit,
                parse_choice<JitMode>(
                    "ATTUNE_JIT",
                    {{"auto", JitMode::automatic}, {"never", JitMode::never}, {"always", JitMode::always}},
                    JitMode::automatic));
  ATTUNE_ASSIGN(
      capture, parse_choice<CaptureMode>("ATTUNE_CAPTURE",
                                         {{"refuse", CaptureMode::refuse}, {"compile", CaptureMode::compile}},
                                         CaptureMode::refuse));
  ATTUNE_ASSIGN(compile_in,
                parse_choice<CompileIn>("ATTUNE_COMPILE_IN",
                                        {{"process", CompileIn::process}, {"child", CompileIn::child}},
                                        CompileIn::process));
  ATTUNE_ASSIGN(compile_limit, parse_compile_limit());
  ATTUNE_ASSIGN(backend, parse_choice<BackendChoice>("ATTUNE_BACKEND",
                                                     {{"auto", BackendChoice::automatic},
                                                      {"cuda", BackendChoice::cuda},
                                                      {"cpu", BackendChoice::cpu}},
                                                     BackendChoice::automatic));
  ATTUNE_ASSIGN(follow_tuned,
                parse_choice<bool>("ATTUNE_TUNED", {{"follow", true}, {"ignore", false}}, true));
  ATTUNE_ASSIGN(max_bytes, parse_max_bytes());
  options.cache_max_bytes = max_bytes;
  options.cache_paths = cache::shared_paths();
  ATTUNE_ASSIGN(remote, cache::remote_options());
  options.remote = std::move(remote);
  options.backend = backend;
  options.follow_tuned = follow_tuned;
  options.cache_mode = mode;
  options.jit = jit;
  options.capture = capture;
  options.compile_in = compile_in;
  options.compile_child.limit = compile_limit;
  options.template_dir = env("ATTUNE_TEMPLATE_DIR").value_or("");
  options.record_path = env("ATTUNE_RECORD").value_or("");
  return options;
}

}  // namespace attune::runtime
