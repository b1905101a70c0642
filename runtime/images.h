// Images: problem -> spec -> source -> key -> bytes, from a layer of the cache or from a compiler. What a
// call goes through whose kernel is not loaded, up to its loading.
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "cache/layers.h"
#include "cache/remote.h"
#include "cache/single_flight.h"
#include "cache/store.h"
#include "codegen/choose.h"
#include "codegen/problem.h"
#include "codegen/unit.h"
#include "runtime/backend.h"
#include "runtime/builds.h"
#include "runtime/engine_options.h"
#include "runtime/tuned_choice.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace attune::runtime {

/// Where a kernel's image came from.
enum class Source { disk, compiler };

/// A kernel's image with everything known about it.
struct Obtained {
  codegen::Unit unit;
  std::string candidate;
  std::string metadata_json;
  std::vector<std::byte> image;
  Source source = Source::compiler;
  std::string layer;  // where on disk it was
};

/// The templates that kernels are made of.
struct TemplateSet {
  std::vector<std::string> owned;  // texts read from a folder
  std::vector<codegen::EmbeddedFile> files;
};

/// The embedded templates, or the files of the same names in `folder`. Fails with environment.
Result<TemplateSet> load_templates(const std::string& folder);

/// Thread-safe.
class Images {
 public:
  /// Refers to the options.
  Images(const EngineOptions& options, TemplateSet templates);

  /// By the compiler of this machine, which is not opened for a kernel that the layers have; where it is
  /// missing, by one whose kernel they have.
  Result<codegen::Unit> unit_of(const kernel::KernelSpec& spec, const codegen::Arch& arch);
  Result<std::pair<codegen::Unit, codegen::Choice>> unit_of(const codegen::Problem& problem,
                                                            const codegen::Arch& arch);
  /// From the first layer that has it, else from the compiler. Callers of one key share the work.
  Result<std::shared_ptr<const Obtained>> obtain(const codegen::Unit& unit, const std::string& candidate);
  /// From the compiler, whatever the layers have, and into the cache.
  Result<std::shared_ptr<const Obtained>> compile(const codegen::Unit& wanted, const std::string& candidate);

  /// What was measured of a problem on the backend's device, in a layer on disk; nothing where nobody did.
  /// Fails with environment where an entry is none of a choice.
  Result<std::optional<TunedChoice>> tuned(const codegen::Problem& problem, const Backend& backend);
  void keep(const TunedChoice& choice, const codegen::Problem& problem, const Backend& backend);

  cache::Store& store() { return store_; }
  cache::Layers& layers() { return layers_; }
  std::span<const codegen::EmbeddedFile> templates() const { return templates_.files; }
  std::uint64_t compiles() const { return compiles_.load(); }

 private:
  bool reads_disk() const {
    return options_.cache_mode == cache::Mode::rw || options_.cache_mode == cache::Mode::ro;
  }
  std::unique_ptr<cache::Remote> open_remote() const;
  Result<codegen::Unit> with_opened_compiler(const codegen::Unit& unit) const;

  const EngineOptions& options_;
  TemplateSet templates_;
  cache::Store store_;
  cache::Layers layers_;
  cache::SingleFlight<Digest, const Obtained> flights_;
  std::once_flag builds_once_;
  std::vector<Build> builds_;  // in the layers, once a compiler was missing
  std::atomic<std::uint64_t> compiles_{0};
};

/// Identity of the compiler for an architecture, and compilation without a device.
Result<codegen::CompilerId> compiler_for(const codegen::Arch& arch);
Result<Image> compile_for(const codegen::Unit& unit);

}  // namespace attune::runtime
