// attune cache list: the kernels on disk as a table, filtered and sorted.
#include "tools/cache_entries.h"
#include "tools/cache_filter.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace attune::tools {
namespace {

using nlohmann::json;

/// The compiler's name and version, without its build; of a choice, where it comes from.
std::string maker_of(const json& metadata) {
  if (is_tuned_choice(metadata)) return "attune bench --tune";
  const std::string name = text_of(metadata, "compiler");
  const std::size_t space = name.find(' ');
  return name.substr(0, space == std::string::npos ? space : name.find(' ', space + 1));
}

json to_json(const CachedKernel& kernel) {
  json object = listed_json(kernel.file);
  object["hits"] = kernel.hits;
  if (!kernel.defect.empty()) {
    object["defect"] = kernel.defect;
    return object;
  }
  for (const char* name : {"candidate", "target", "compiler"}) object[name] = text_of(kernel.metadata, name);
  object["spec"] = kernel.metadata.value("spec", json::object());
  if (is_tuned_choice(kernel.metadata)) {
    for (const char* name : {"kind", "device", "problem"}) object[name] = text_of(kernel.metadata, name);
  }
  return object;
}

void add_row(Table& table, const CachedKernel& kernel) {
  const std::string key = kernel.file.key.hex().substr(0, kShortKey);
  const std::string size = bytes_text(kernel.file.bytes);
  const std::string hits = std::to_string(kernel.hits);
  const std::string age = age_text(seconds_since(kernel.file.modified_unix));
  const std::string used = age_text(seconds_since(kernel.file.used_unix));
  const auto text = [&](const char* name) { return text_of(kernel.metadata, name); };
  if (kernel.defect.empty()) {
    table.row({key, text("candidate"), spec_text(kernel.metadata), text("target"), size, hits, age, used,
               maker_of(kernel.metadata)});
  } else {
    table.row({key, "-", paint("defective, see `attune cache verify`", Colour::red, Stream::out), "-", size,
               hits, age, used, "-"});
  }
}

Result<int> list(CacheFilter& filter, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_TRY(filter.prepare());
  const auto all = cached_kernels(*store);
  const auto kernels = filter.apply(all);
  Table table({"key", "candidate", "spec", "arch", ">size", ">hits", ">age", ">used", "compiler"});
  json entries = json::array();
  std::uint64_t bytes = 0;
  for (const CachedKernel& kernel : kernels) {
    bytes += kernel.file.bytes;
    add_row(table, kernel);
    entries.push_back(to_json(kernel));
  }
  if (as_json) {
    ATTUNE_TRY(
        print_json({{"root", store->root().string()}, {"bytes", bytes}, {"entries", std::move(entries)}}));
  } else {
    const std::string count = kernels.size() == all.size()
                                  ? std::to_string(all.size())
                                  : fmt::format("{} of {}", kernels.size(), all.size());
    ATTUNE_TRY(print(fmt::format("{}{} kernels, {} in {}\n", kernels.empty() ? "" : table.text(), count,
                                 bytes_text(bytes), printable(store->root().string()))));
  }
  return kOk;
}

}  // namespace

void add_cache_list(CLI::App& cache, Session& session) {
  auto filter = std::make_shared<CacheFilter>();
  CLI::App* command = cache.add_subcommand("list", "The kernels, their sizes, hits, ages and last uses");
  filter->add_options(*command);
  command->callback(
      [filter, &session] { session.action = [filter, &session] { return list(*filter, session.json); }; });
}

}  // namespace attune::tools
