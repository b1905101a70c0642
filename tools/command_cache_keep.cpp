// attune cache verify, prune and stats: is it whole, what may go, and what it was good for.
#include "base/size.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace attune::tools {
namespace {

using nlohmann::json;

// ---- verify ----

Result<int> verify(bool quarantine, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  const auto entries = store->list();
  json defects = json::array();
  std::string text;
  for (const cache::Listed& listed : entries) {
    const auto entry = store->inspect(listed.key);
    if (entry.ok()) continue;
    json defect = listed_json(listed);
    defect["defect"] = entry.failure().message;
    defect["quarantined"] = quarantine && store->quarantine(listed.key);
    text += fmt::format("{} {}: {}{}\n", paint("defective", Colour::red, Stream::out),
                        printable(listed.path.string()), printable(entry.failure().message),
                        defect["quarantined"] ? " (moved to quarantine)" : "");
    defects.push_back(std::move(defect));
  }
  text += fmt::format("{} entries read, {} defective\n", entries.size(), defects.size());
  const int exit_code = defects.empty() ? kOk : kWrongResult;
  ATTUNE_TRY(as_json ? print_json({{"root", store->root().string()},
                                   {"entries", entries.size()},
                                   {"defects", std::move(defects)}})
                     : print(text));
  return exit_code;
}

// ---- prune ----

struct PruneOptions {
  std::string max_size;
  std::string older_than;
  bool dry_run = false;
};

/// With nothing asked for, the bound that the cache keeps by itself.
Result<cache::PruneLimits> limits_of(const PruneOptions& options, const cache::Store& store) {
  cache::PruneLimits limits{.dry_run = options.dry_run};
  if (!options.max_size.empty()) {
    ATTUNE_ASSIGN(bytes, parse_size(options.max_size));
    limits.max_bytes = bytes;
  }
  if (!options.older_than.empty()) {
    ATTUNE_ASSIGN(age, parse_age(options.older_than));
    limits.max_age = age;
  }
  if (!limits.max_bytes && !limits.max_age && store.max_bytes() > 0) limits.max_bytes = store.max_bytes();
  return limits;
}

Result<int> prune(const PruneOptions& options, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_ASSIGN(limits, limits_of(options, *store));
  ATTUNE_ASSIGN(pruned, store->prune(limits));
  Table table;
  json removed = json::array();
  for (const cache::Listed& listed : pruned.removed) {
    removed.push_back(listed_json(listed));
    table.row({listed.key.hex().substr(0, kShortKey), bytes_text(listed.bytes),
               fmt::format("used {} ago", age_text(seconds_since(listed.used_unix)))});
  }
  if (as_json) {
    ATTUNE_TRY(print_json({{"root", store->root().string()},
                           {"dry_run", options.dry_run},
                           {"removed", std::move(removed)},
                           {"removed_bytes", pruned.removed_bytes},
                           {"kept", pruned.kept},
                           {"kept_bytes", pruned.kept_bytes}}));
  } else {
    ATTUNE_TRY(
        print(fmt::format("{}{} {} kernels, {}; {} stay, {}\n", options.dry_run ? table.text() : "",
                          options.dry_run ? "would remove" : "removed", pruned.removed.size(),
                          bytes_text(pruned.removed_bytes), pruned.kept, bytes_text(pruned.kept_bytes))));
  }
  return kOk;
}

// ---- stats ----

Result<int> stats(bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_ASSIGN(totals, store->totals());
  const auto entries = store->list();
  std::uint64_t bytes = 0;
  for (const cache::Listed& listed : entries) bytes += listed.bytes;
  json object{{"root", store->root().string()},  {"kernels", entries.size()}, {"bytes", bytes},
              {"max_bytes", store->max_bytes()}, {"hits", totals.hits},       {"misses", totals.misses},
              {"defects", totals.defects},       {"stores", totals.stores},   {"compiles", totals.compiles},
              {"evictions", totals.evictions}};
  if (as_json) {
    ATTUNE_TRY(print_json(object));
    return kOk;
  }
  const std::uint64_t lookups = totals.hits + totals.misses;
  const std::string share = lookups == 0
                                ? ""
                                : fmt::format(" ({:.1f} %)", 100.0 * static_cast<double>(totals.hits) /
                                                                 static_cast<double>(lookups));
  const std::string bound = store->max_bytes() == 0 ? "no bound" : "bound " + bytes_text(store->max_bytes());
  Table table;
  table.row({"folder", printable(store->root().string())});
  table.row({"kernels", fmt::format("{}, {} ({})", entries.size(), bytes_text(bytes), bound)});
  table.row({"hits", fmt::format("{}{}", totals.hits, share)});
  for (const char* name : {"misses", "defects", "stores", "compiles", "evictions"}) {
    table.row({name, object[name].dump()});
  }
  ATTUNE_TRY(print(table.text()));
  return kOk;
}

}  // namespace

void add_cache_verify(CLI::App& cache, Session& session) {
  auto quarantine = std::make_shared<bool>(false);
  CLI::App* command = cache.add_subcommand("verify", "Read every entry; exit 1 when one is defective");
  command->add_flag("--quarantine", *quarantine, "Move defective entries away");
  command->callback([quarantine, &session] {
    session.action = [quarantine, &session] { return verify(*quarantine, session.json); };
  });
}

void add_cache_prune(CLI::App& cache, Session& session) {
  auto options = std::make_shared<PruneOptions>();
  CLI::App* command = cache.add_subcommand(
      "prune",
      "Remove kernels, the least recently used first; without a limit, down to ATTUNE_CACHE_MAX_SIZE");
  command->add_option("--max-size", options->max_size, "What may stay: 500M, 2G");
  command->add_option("--older-than", options->older_than, "Remove what was last used longer ago: 3h, 12d");
  command->add_flag("--dry-run", options->dry_run, "Only tell what would go");
  command->callback([options, &session] {
    session.action = [options, &session] { return prune(*options, session.json); };
  });
}

void add_cache_stats(CLI::App& cache, Session& session) {
  cache.add_subcommand("stats", "What all processes have done with the cache")->callback([&session] {
    session.action = [&session] { return stats(session.json); };
  });
}

}  // namespace attune::tools
