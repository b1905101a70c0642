#include "tools/cache_filter.h"

#include "base/size.h"
#include "codegen/arch.h"
#include "codegen/names.h"
#include "tools/cache_entries.h"
#include "tools/console.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

namespace attune::tools {
namespace {

using nlohmann::json;

/// Is the field one of those that were asked for, if any were?
bool is_among(const std::vector<std::string>& wanted, const json& object, const char* name) {
  return wanted.empty() || std::ranges::find(wanted, text_of(object, name)) != wanted.end();
}

template <typename Value, typename Parse>
Result<void> read_option(const std::string& text, std::optional<Value>& value, Parse&& parse) {
  if (text.empty()) return done();
  ATTUNE_ASSIGN(parsed, parse(text));
  value = parsed;
  return done();
}

template <typename Enum>
CLI::Validator is_name_of() {
  const auto& names = codegen::EnumNames<Enum>::kValues;
  return CLI::IsMember(std::vector<std::string>(names.begin(), names.end()));
}

/// What entries are sorted by: numbers descend, so that the largest and the longest unused come first.
std::pair<std::int64_t, std::string> rank_of(const CachedKernel& kernel, const std::string& sort) {
  if (sort == "size") return {-static_cast<std::int64_t>(kernel.file.bytes), ""};
  if (sort == "hits") return {-static_cast<std::int64_t>(kernel.hits), ""};
  if (sort == "age") return {kernel.file.modified_unix, ""};
  if (sort == "used") return {kernel.file.used_unix, ""};
  if (sort == "key") return {0, ""};  // as they come
  return {0, text_of(kernel.metadata, sort.c_str())};
}

}  // namespace

std::vector<CachedKernel> cached_kernels(const cache::Store& store) {
  std::vector<CachedKernel> kernels;
  const auto read = store.kernel_hits();
  const cache::KernelHits hits = read.ok() ? *read : cache::KernelHits();  // one that can't be read has none
  for (cache::Listed& file : store.list()) {
    const auto entry = store.inspect(file.key);
    const std::uint64_t of_file = hits.of(file.key);
    kernels.push_back({.file = std::move(file), .hits = of_file});
    if (entry.ok()) {
      kernels.back().metadata = metadata_of(*entry);
    } else {
      kernels.back().defect = entry.failure().message;
    }
  }
  return kernels;
}

void CacheFilter::add_options(CLI::App& command) {
  const auto names = [&](const char* option, std::vector<std::string>& values, const char* what) {
    return command.add_option(option, values, what)
        ->delimiter(',')
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  names("--target", targets_, "Only kernels for these: sm_90a,x86-64-v4")->check([](const std::string& name) {
    const auto arch = codegen::arch_from_name(name);
    return arch.ok() ? "" : arch.failure().message;
  });
  names("--family", families_, "Only these families: mma,sm90")->check(is_name_of<kernel::Family>());
  names("--candidate", candidates_, "Only these candidates");
  names("--operation", operations_, "Only these operations: forward,grad_query")
      ->check(is_name_of<kernel::Operation>());
  names("--dtype", dtypes_, "Only kernels for these types: f16,bf16")->check(is_name_of<kernel::DType>());
  command.add_option("--unused-for", unused_for_,
                     "Only those last used so long ago or longer: 90s, 5min, 3h, 12d");
  command.add_option("--used-within", used_within_, "Only those last used so long ago or later");
  command.add_option("--at-least", at_least_, "Only those of so many bytes or more: 500K, 1M");
  command.add_option("--at-most", at_most_, "Only those of so many bytes or less");
  command.add_flag("--defective", defective_, "Only entries that are not whole");
  command.add_option("--sort", sort_, "By what; the largest, most often hit, oldest or longest unused first")
      ->check(CLI::IsMember({"key", "size", "hits", "age", "used", "target", "candidate"}))
      ->capture_default_str();
  command.add_flag("--reverse", reverse_, "The other way round");
}

Result<void> CacheFilter::prepare() {
  ATTUNE_TRY(read_option(unused_for_, unused_for_seconds_, parse_age));
  ATTUNE_TRY(read_option(used_within_, used_within_seconds_, parse_age));
  ATTUNE_TRY(read_option(at_least_, at_least_bytes_, parse_size));
  return read_option(at_most_, at_most_bytes_, parse_size);
}

bool CacheFilter::accepts(const CachedKernel& kernel) const {
  const json spec = kernel.metadata.value("spec", json::object());
  const std::chrono::seconds unused(seconds_since(kernel.file.used_unix));
  return is_among(targets_, kernel.metadata, "target") && is_among(families_, spec, "family") &&
         is_among(candidates_, kernel.metadata, "candidate") && is_among(operations_, spec, "operation") &&
         is_among(dtypes_, spec, "dtype") &&
         unused >= unused_for_seconds_.value_or(std::chrono::seconds::min()) &&
         unused <= used_within_seconds_.value_or(std::chrono::seconds::max()) &&
         kernel.file.bytes >= at_least_bytes_.value_or(0) &&
         kernel.file.bytes <= at_most_bytes_.value_or(std::numeric_limits<std::uint64_t>::max()) &&
         (!defective_ || !kernel.defect.empty());
}

std::vector<CachedKernel> CacheFilter::apply(std::vector<CachedKernel> kernels) const {
  std::erase_if(kernels, [&](const CachedKernel& kernel) { return !accepts(kernel); });
  std::ranges::stable_sort(kernels, {}, [&](const CachedKernel& kernel) { return rank_of(kernel, sort_); });
  if (reverse_) std::ranges::reverse(kernels);
  return kernels;
}

}  // namespace attune::tools
