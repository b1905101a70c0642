// attune cache unpack: a pack's kernels back into a cache folder, or a list of them.
#include "cache/pack.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <functional>
#include <memory>
#include <vector>

namespace attune::tools {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct UnpackOptions {
  std::string pack;
  std::string into;
  bool list = false;
};

Result<cache::Pack> open_pack(const std::string& path) {
  ATTUNE_ASSIGN(key, cache::configured_pack_key());
  return cache::Pack::open(path, key ? &*key : nullptr);
}

/// Reads every entry; the first defect ends it.
Result<void> for_each_entry(
    const cache::Pack& pack,
    const std::function<Result<void>(const cache::PackRecord&, const cache::Entry&)>& visit) {
  for (std::size_t i = 0; i < pack.index().size(); ++i) {
    const cache::PackRecord record = pack.index().at(i);
    ATTUNE_ASSIGN(entry, pack.find(record.key));
    ATTUNE_TRY(visit(record, *entry));
  }
  return done();
}

json pack_json(const cache::Pack& pack) {
  const json manifest = json::parse(pack.index().manifest(), nullptr, /*allow_exceptions=*/false);
  return {{"path", pack.path().string()},
          {"signed", pack.index().header().is_signed},
          {"manifest", manifest.is_object() ? manifest : json::object()}};
}

Result<int> list(const UnpackOptions& options, bool as_json) {
  ATTUNE_ASSIGN(pack, open_pack(options.pack));
  Table table({"key", "candidate", "spec", "arch", ">size", ">packed"});
  json entries = json::array();
  ATTUNE_TRY(
      for_each_entry(pack, [&](const cache::PackRecord& record, const cache::Entry& entry) -> Result<void> {
        const json metadata = metadata_of(entry);
        table.row({record.key.hex().substr(0, kShortKey), text_of(metadata, "candidate"), spec_text(metadata),
                   text_of(metadata, "target"), bytes_text(entry.payload.size()),
                   bytes_text(record.stored_bytes)});
        entries.push_back({{"key", record.key.hex()},
                           {"candidate", text_of(metadata, "candidate")},
                           {"target", text_of(metadata, "target")},
                           {"spec", metadata.value("spec", json::object())},
                           {"payload_bytes", entry.payload.size()},
                           {"packed_bytes", record.stored_bytes}});
        return done();
      }));
  json object = pack_json(pack);
  if (as_json) {
    object["entries"] = std::move(entries);
    ATTUNE_TRY(print_json(object));
  } else {
    ATTUNE_TRY(print(fmt::format("{}{} kernels in {}, {}\n", table.text(), pack.index().size(), options.pack,
                                 object["signed"] ? "signed" : "not signed")));
  }
  return kOk;
}

Result<int> unpack_into(cache::Store& store, const UnpackOptions& options, bool as_json) {
  if (store.mode() != cache::Mode::rw && store.mode() != cache::Mode::refresh)
    return environment_failure(
        "the cache is not written: leave ATTUNE_CACHE_MODE at rw, or name a folder with --into");
  ATTUNE_ASSIGN(pack, open_pack(options.pack));
  ATTUNE_TRY(for_each_entry(pack, [&](const cache::PackRecord&, const cache::Entry& entry) -> Result<void> {
    store.store(entry);
    if (store.counters().store_errors == 0) return done();
    return environment_failure(
        fmt::format("{} could not be written; `attune doctor` says why", store.root().string()));
  }));
  json object = pack_json(pack);
  object["root"] = store.root().string();
  object["kernels"] = pack.index().size();
  ATTUNE_TRY(as_json ? print_json(object)
                     : print(fmt::format("{} kernels in {}\n", pack.index().size(), store.root().string())));
  return kOk;
}

Result<int> unpack(const UnpackOptions& options, bool as_json) {
  if (options.into.empty()) {
    ATTUNE_ASSIGN(store, open_store());
    return unpack_into(*store, options, as_json);
  }
  std::string trouble;
  cache::Store store(
      options.into, cache::Mode::rw, [&](const std::string& line) { trouble = line; },
      /*max_bytes=*/0);
  auto unpacked = unpack_into(store, options, as_json);
  return trouble.empty() ? unpacked : environment_failure(trouble);
}

}  // namespace

void add_cache_unpack(CLI::App& cache, Session& session) {
  auto options = std::make_shared<UnpackOptions>();
  CLI::App* command = cache.add_subcommand("unpack", "Write a pack's kernels to the cache, or list them");
  command->add_option("PACK", options->pack, "The file; ATTUNE_PACK_KEY says whose signature it needs")
      ->required();
  command->add_option("--into", options->into, "A cache folder other than the user's own");
  command->add_flag("--list", options->list, "Only show what is in it");
  command->callback([options, &session] {
    session.action = [options, &session] {
      return options->list ? list(*options, session.json) : unpack(*options, session.json);
    };
  });
}

}  // namespace attune::tools
