// Which entries `attune cache list` shows, and in which order.
#pragma once

#include "base/result.h"
#include "cache/store.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace attune::tools {

/// An entry's file, and what was read from it.
struct CachedKernel {
  cache::Listed file;
  std::uint64_t hits = 0;
  nlohmann::json metadata = nlohmann::json::object();
  std::string defect;  // empty: it is whole
};

/// Every entry of the cache; each is read and verified.
std::vector<CachedKernel> cached_kernels(const cache::Store& store);

class CacheFilter {
 public:
  void add_options(CLI::App& command);
  /// Reads the options' values. Fails with invalid_argument.
  Result<void> prepare();
  /// The ones asked for, in the order asked for.
  std::vector<CachedKernel> apply(std::vector<CachedKernel> kernels) const;

 private:
  bool accepts(const CachedKernel& kernel) const;

  std::vector<std::string> targets_, families_, candidates_, operations_, dtypes_;
  std::string unused_for_, used_within_, at_least_, at_most_;
  bool defective_ = false;
  std::string sort_ = "key";
  bool reverse_ = false;

  std::optional<std::chrono::seconds> unused_for_seconds_, used_within_seconds_;
  std::optional<std::uint64_t> at_least_bytes_, at_most_bytes_;
};

}  // namespace attune::tools
