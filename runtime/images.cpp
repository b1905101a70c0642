#include "runtime/images.h"

#include "attune/version.h"
#include "base/file.h"
#include "base/log.h"
#include "cache/turn.h"
#include "codegen/embedded.h"
#include "codegen/names.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/explanation.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <filesystem>
#include <optional>

namespace attune::runtime {
namespace {

using nlohmann::json;

void warn(const std::string& line) {
  log(LogLevel::warn, line);
}

/// What an entry says about itself. No time and no path: the same kernel gives the same bytes everywhere.
std::string entry_metadata(const codegen::Unit& unit, const std::string& candidate,
                           const std::string& compile_json) {
  json fields = json::object();
  for (const auto& [tag, value] : codegen::key_fields(unit)) fields[tag] = value;
  return json{{"attune", ATTUNE_VERSION},
              {"target", unit.arch.target},
              {"candidate", candidate},
              {"spec", spec_json(unit.spec)},
              {"compiler", unit.compiler.name},
              {"options", unit.compiler.options},
              {"key_fields", fields},
              {"compile", json::parse(compile_json, nullptr, /*allow_exceptions=*/false)}}
      .dump();
}

}  // namespace

Result<TemplateSet> load_templates(const std::string& folder) {
  TemplateSet set;
  const auto embedded = codegen::embedded_files();
  set.files.assign(embedded.begin(), embedded.end());
  if (folder.empty()) return set;
  set.owned.reserve(set.files.size());
  for (codegen::EmbeddedFile& file : set.files) {
    ATTUNE_ASSIGN(bytes, read_file(std::filesystem::path(folder) / file.name));
    const std::string& text =
        set.owned.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    file = codegen::file_with_digest(file.name, text);
  }
  return set;
}

Images::Images(const EngineOptions& options, TemplateSet templates)
    : options_(options),
      templates_(std::move(templates)),
      store_(options.cache_root.value_or(std::filesystem::path()),
             options.cache_root ? options.cache_mode : cache::Mode::off, warn, options.cache_max_bytes),
      layers_(store_, reads_disk() ? options.cache_paths : std::vector<std::filesystem::path>(), warn,
              open_remote()) {}

std::unique_ptr<cache::Remote> Images::open_remote() const {
  if (!options_.remote || !reads_disk()) return nullptr;
  cache::RemoteOptions remote = *options_.remote;
  remote.writable = remote.writable && options_.cache_mode == cache::Mode::rw;
  return std::make_unique<cache::Remote>(std::move(remote));
}

Result<std::pair<codegen::Unit, codegen::Choice>> Images::unit_of(const codegen::Problem& problem,
                                                                  const codegen::Arch& arch) {
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
  ATTUNE_ASSIGN(unit, unit_of(choice.spec, arch));
  return std::pair{std::move(unit), std::move(choice)};
}

Result<codegen::Unit> Images::unit_of(const kernel::KernelSpec& spec, const codegen::Arch& arch) {
  if (options_.jit != JitMode::always && arch.backend == codegen::Backend::cuda) {
    if (auto likely = nvrtc_at_a_glance(arch)) {
      codegen::Unit unit = codegen::make_unit(spec, arch, std::move(*likely), templates_.files);
      if (layers_.may_have(unit.key)) return unit;
    }
  }
  auto compiler = compiler_for(arch);
  if (compiler.ok()) return codegen::make_unit(spec, arch, std::move(*compiler), templates_.files);
  if (options_.jit == JitMode::always) return compiler.failure();
  std::call_once(builds_once_, [this] { builds_ = builds_in(layers_.descriptions()); });
  for (const Build& build : builds_) {
    if (build.target != arch.target) continue;
    codegen::Unit unit = codegen::make_unit(spec, arch, build.compiler, templates_.files);
    if (layers_.locate(unit.key)) return unit;
  }
  return compiler.failure();
}

Result<std::shared_ptr<const Obtained>> Images::obtain(const codegen::Unit& unit,
                                                       const std::string& candidate) {
  return flights_.run(unit.key, [&]() -> Result<std::shared_ptr<const Obtained>> {
    const auto take = [&](cache::Found&& found) {
      log(LogLevel::debug, fmt::format("kernel {} is from {}", unit.key.hex().substr(0, 12), found.layer));
      return std::make_shared<const Obtained>(Obtained{unit, candidate, std::move(found.entry.metadata_json),
                                                       std::move(found.entry.payload), Source::disk,
                                                       std::move(found.layer)});
    };
    if (options_.jit == JitMode::always) return compile(unit, candidate);
    if (auto found = layers_.find(unit.key)) return take(std::move(*found));
    if (options_.jit == JitMode::never) return compile(unit, candidate);  // which says why not
    cache::Turn turn = cache::take_turn(store_, unit.key);                // until the new entry is stored
    if (turn.entry) return take({std::move(*turn.entry), store_.root().string()});
    return compile(unit, candidate);
  });
}

/// The unit with the compiler as it says itself that it is, once opened. unit_of() may have read that from
/// its file, which can mislead.
Result<codegen::Unit> Images::with_opened_compiler(const codegen::Unit& unit) const {
  ATTUNE_ASSIGN(compiler, compiler_for(unit.arch));
  if (compiler == unit.compiler) return unit;
  return codegen::make_unit(unit.spec, unit.arch, std::move(compiler), templates_.files);
}

Result<std::shared_ptr<const Obtained>> Images::compile(const codegen::Unit& wanted,
                                                        const std::string& candidate) {
  if (options_.jit == JitMode::never) {
    return environment_failure(
        fmt::format("kernel {} ({}) for {} is not in the cache and ATTUNE_JIT=never forbids compiling; list "
                    "the problem for "
                    "`attune precompile --arch {}` and run that first",
                    wanted.key.hex().substr(0, 12), candidate, wanted.arch.target, wanted.arch.target));
  }
  ATTUNE_ASSIGN(unit, with_opened_compiler(wanted));
  const auto begin = std::chrono::steady_clock::now();
  ATTUNE_ASSIGN(image, options_.compile_in == CompileIn::child
                           ? compile_in_child(unit, options_.compile_child)
                           : compile_for(unit));
  compiles_.fetch_add(1, std::memory_order_relaxed);
  store_.compiled();
  if (log_enabled(LogLevel::info)) {
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    log(LogLevel::info, fmt::format("compiled {} {} for {} in {:.0f} ms", candidate,
                                    unit.key.hex().substr(0, 12), unit.arch.target, took.count()));
  }
  auto obtained = std::make_shared<Obtained>(Obtained{unit, candidate,
                                                      entry_metadata(unit, candidate, image.metadata_json),
                                                      std::move(image.bytes), Source::compiler, ""});
  layers_.store({.key = unit.key, .metadata_json = obtained->metadata_json, .payload = obtained->image});
  return std::shared_ptr<const Obtained>(std::move(obtained));
}

Result<std::optional<TunedChoice>> Images::tuned(const codegen::Problem& problem, const Backend& backend) {
  const Digest key = tuned_key(problem, backend, templates_.files);
  if (!layers_.may_have(key))
    return std::optional<TunedChoice>();  // most problems have none: that is no miss
  const auto found = layers_.find(key);
  if (!found) return std::optional<TunedChoice>();
  ATTUNE_ASSIGN(choice, tuned_choice_of(found->entry));
  return std::optional(std::move(choice));
}

void Images::keep(const TunedChoice& choice, const codegen::Problem& problem, const Backend& backend) {
  layers_.store(tuned_entry(tuned_key(problem, backend, templates_.files), choice, problem, backend));
}

Result<codegen::CompilerId> compiler_for(const codegen::Arch& arch) {
  if (arch.backend == codegen::Backend::cpu) return clang_compiler(arch);
  return nvrtc_compiler(arch);
}

Result<Image> compile_for(const codegen::Unit& unit) {
  return unit.arch.backend == codegen::Backend::cpu ? clang_compile(unit) : nvrtc_compile(unit);
}

}  // namespace attune::runtime
