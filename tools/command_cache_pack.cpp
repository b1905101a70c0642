// attune cache pack: kernels of the cache in one file, to be carried to machines that compile nothing.
#include "attune/version.h"
#include "base/file.h"
#include "cache/pack_writer.h"
#include "cache/packed_entry.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/output_file.h"
#include "tools/parallel.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

namespace attune::tools {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// A pack that others may write to is refused when it is opened.
constexpr auto kNotForOthersToWrite = static_cast<fs::perms>(0644);

struct PackOptions {
  std::string out;
  std::vector<std::string> keys;
  std::vector<std::string> archs;
  std::string signing_key;
};

/// What a pack says of itself. Nothing that differs between two machines that pack the same kernels.
struct Manifest {
  std::set<json> builds;  // by which a machine without these compilers finds the kernels (runtime/builds.h)
  std::set<std::string> targets;
  std::size_t kernels = 0;
  std::mutex mutex;  // of add()

  /// Thread-safe.
  void add(const json& metadata) {
    json build;
    for (const char* name : {"target", "compiler", "options"}) build[name] = metadata.value(name, json());
    const std::lock_guard lock(mutex);
    targets.insert(text_of(metadata, "target"));
    if (is_tuned_choice(metadata)) return;
    builds.insert(std::move(build));
    ++kernels;
  }
  json to_json() const {
    return {{"attune", ATTUNE_VERSION},
            {"zstd", cache::zstd_version()},
            {"builds", builds},
            {"targets", targets},
            {"kernels", kernels}};
  }
};

Result<std::optional<cache::SigningKey>> signing_key_of(const std::string& path) {
  if (path.empty()) return std::optional<cache::SigningKey>();
  auto pem = read_file(path);
  if (!pem.ok()) return invalid_argument(pem.failure().message);
  auto key = cache::SigningKey::from_pem({reinterpret_cast<const char*>(pem->data()), pem->size()});
  if (!key.ok()) return invalid_argument(fmt::format("{}: {}", path, key.failure().message));
  return std::optional(std::move(*key));
}

/// Every entry, or those of the named keys.
Result<std::vector<cache::Listed>> named_entries(const cache::Store& store,
                                                 const std::vector<std::string>& keys) {
  if (keys.empty()) return store.list();
  std::vector<cache::Listed> named;
  for (const std::string& prefix : keys) {
    ATTUNE_ASSIGN(listed, find_by_prefix(store, prefix));
    const bool known = std::ranges::find(named, listed.key, &cache::Listed::key) != named.end();
    if (!known) named.push_back(std::move(listed));
  }
  return named;
}

/// Adds an entry unless it is for another architecture.
Result<void> add(const cache::Store& store, const cache::Listed& listed, const PackOptions& options,
                 cache::PackWriter& writer, Manifest& manifest) {
  const auto entry = store.inspect(listed.key);
  if (!entry.ok()) {
    return internal_failure(
        fmt::format("{} is defective: {}; `attune cache verify --quarantine` moves it away",
                    listed.path.string(), entry.failure().message));
  }
  const json metadata = metadata_of(*entry);
  if (!options.archs.empty() && !std::ranges::count(options.archs, text_of(metadata, "target")))
    return done();
  ATTUNE_TRY(writer.add(*entry));
  manifest.add(metadata);
  return done();
}

/// Fills the pack. One defective entry stops it: a pack that silently lacks a kernel fails where it is used.
Result<void> collect(const cache::Store& store, const PackOptions& options, cache::PackWriter& writer,
                     Manifest& manifest) {
  ATTUNE_ASSIGN(entries, named_entries(store, options.keys));
  std::vector<Result<void>> added(entries.size());
  parallel_for(entries.size(), default_jobs(),
               [&](std::size_t i) { added[i] = add(store, entries[i], options, writer, manifest); });
  for (const Result<void>& one : added) ATTUNE_TRY(one);
  if (manifest.kernels == 0) {
    return invalid_argument(fmt::format(
        "no kernel to pack in {}{}; `attune cache list` shows them", store.root().string(),
        options.archs.empty() ? "" : " for " + fmt::format("{}", fmt::join(options.archs, ", "))));
  }
  return done();
}

Result<int> pack(const PackOptions& options, bool as_json) {
  ATTUNE_ASSIGN(key, signing_key_of(options.signing_key));
  ATTUNE_ASSIGN(store, open_store());
  cache::PackWriter writer;
  Manifest manifest;
  ATTUNE_TRY(collect(*store, options, writer, manifest));
  ATTUNE_ASSIGN(bytes, writer.finish(manifest.to_json().dump(), key ? &*key : nullptr));
  ATTUNE_TRY(write_output_file(options.out, bytes, kNotForOthersToWrite));
  ATTUNE_TRY(as_json ? print_json({{"path", options.out},
                                   {"bytes", bytes.size()},
                                   {"sha256", sha256(bytes).hex()},
                                   {"signed", key.has_value()},
                                   {"manifest", manifest.to_json()}})
                     : print(fmt::format("{}: {} kernels for {}, {}{}\n", options.out, manifest.kernels,
                                         fmt::join(manifest.targets, ", "), bytes_text(bytes.size()),
                                         key ? ", signed" : "")));
  return kOk;
}

}  // namespace

void add_cache_pack(CLI::App& cache, Session& session) {
  auto options = std::make_shared<PackOptions>();
  CLI::App* command = cache.add_subcommand(
      "pack", "Write kernels to one file, which ATTUNE_CACHE_PATH may name on other machines");
  command->add_option("OUT", options->out, "The pack")->required();
  command->add_option("KEY", options->keys,
                      "Keys, or the first digits of them; all kernels when none is named");
  command->add_option("--arch", options->archs, "Only kernels for these architectures: sm_90a,x86-64-v4")
      ->delimiter(',')
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--sign", options->signing_key, "Sign with the Ed25519 private key in this PEM file");
  command->callback(
      [options, &session] { session.action = [options, &session] { return pack(*options, session.json); }; });
}

}  // namespace attune::tools
