// attune cache list, show and verify: what the cache on disk holds, and whether it is whole.
#include "cache/cubin.h"
#include "runtime/engine.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>

namespace attune::tools {
namespace {

using nlohmann::json;

constexpr std::size_t kShortKey = 8;

struct CacheOptions {
  std::string key;
  bool quarantine = false;
};

Result<cache::Store*> open_store() {
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  cache::Store& store = engine->store();
  if (store.root().empty())
    return environment_failure("there is no cache folder: set ATTUNE_CACHE_DIR or HOME");
  return &store;
}

std::int64_t age_of(const cache::Listed& listed) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::max<std::int64_t>(
      0, std::chrono::duration_cast<std::chrono::seconds>(now).count() - listed.modified_unix);
}

/// What the kernel's makers wrote about it; an empty object if it is none of ours.
json metadata_of(const cache::Entry& entry) {
  json metadata = json::parse(entry.metadata_json, nullptr, /*allow_exceptions=*/false);
  return metadata.is_object() ? metadata : json::object();
}

std::string text_of(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end()) return "?";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

/// "f16 K=64 Kv=72 right lse": what tells kernels of one family apart.
std::string spec_text(const json& metadata) {
  const json spec = metadata.value("spec", json::object());
  std::string text = fmt::format("{} K={}", text_of(spec, "dtype"), text_of(spec, "head_dim"));
  if (text_of(spec, "head_dim_v") != text_of(spec, "head_dim")) text += " Kv=" + text_of(spec, "head_dim_v");
  if (text_of(spec, "window_left") == "bounded") text += " left";
  if (text_of(spec, "window_right") == "bounded") text += " right";
  if (text_of(spec, "lse") == "write") text += " lse";
  return text;
}

/// The compiler's name and version, without its build.
std::string short_compiler(const std::string& name) {
  const std::size_t space = name.find(' ');
  return name.substr(0, space == std::string::npos ? space : name.find(' ', space + 1));
}

json listed_json(const cache::Listed& listed) {
  return {{"key", listed.key.hex()},
          {"path", listed.path.string()},
          {"bytes", listed.bytes},
          {"modified_unix", listed.modified_unix}};
}

// ---- list ----

Result<int> list(bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  Table table({"key", "candidate", "spec", "arch", ">size", ">age", "compiler"});
  json entries = json::array();
  std::uint64_t total = 0;
  for (const cache::Listed& listed : store->list()) {
    const auto entry = store->inspect(listed.key);
    json object = listed_json(listed);
    total += listed.bytes;
    const std::string key = listed.key.hex().substr(0, kShortKey);
    const std::string size = bytes_text(listed.bytes);
    const std::string age = age_text(age_of(listed));
    if (entry.ok()) {
      const json metadata = metadata_of(*entry);
      for (const char* name : {"candidate", "target", "compiler"}) object[name] = text_of(metadata, name);
      object["spec"] = metadata.value("spec", json::object());
      table.row({key, object["candidate"], spec_text(metadata), object["target"], size, age,
                 short_compiler(object["compiler"])});
    } else {
      object["defect"] = entry.failure().message;
      table.row({key, "-", paint("defective, see `attune cache verify`", Colour::red, Stream::out), "-", size,
                 age, "-"});
    }
    entries.push_back(std::move(object));
  }
  if (as_json) {
    ATTUNE_TRY(print_json({{"root", store->root().string()}, {"bytes", total}, {"entries", entries}}));
  } else {
    const std::string rows = entries.empty() ? "" : table.text();
    ATTUNE_TRY(print(fmt::format("{}{} kernels, {} in {}\n", rows, entries.size(), bytes_text(total),
                                 store->root().string())));
  }
  return kOk;
}

// ---- show ----

Result<cache::Listed> find_by_prefix(const cache::Store& store, const std::string& prefix) {
  std::optional<cache::Listed> found;
  for (const cache::Listed& listed : store.list()) {
    if (!listed.key.hex().starts_with(prefix)) continue;
    if (found) {
      return invalid_argument(fmt::format("key {} is ambiguous: {} and {}; give more digits", prefix,
                                          found->key.hex().substr(0, prefix.size() + kShortKey),
                                          listed.key.hex().substr(0, prefix.size() + kShortKey)));
    }
    found = listed;
  }
  if (!found) {
    return invalid_argument(
        fmt::format("no kernel in {} has a key that begins with {}; `attune cache list` "
                    "shows them",
                    store.root().string(), prefix));
  }
  return *found;
}

json cubin_json(const cache::CubinInfo& cubin) {
  json kernels = json::object();
  for (const cache::CubinKernel& kernel : cubin.kernels) {
    kernels[kernel.name] = {{"registers", kernel.registers},       {"stack_bytes", kernel.stack_bytes},
                            {"shared_bytes", kernel.shared_bytes}, {"barriers", kernel.barriers},
                            {"max_threads", kernel.max_threads},   {"code_bytes", kernel.code_bytes}};
  }
  return {{"sm", cubin.sm}, {"kernels", std::move(kernels)}};
}

/// Nested objects as "outer.inner" rows; compiler options are one to a line and become one line.
void add_rows(Table& table, const std::string& prefix, const json& object) {
  for (const auto& [name, value] : object.items()) {
    const std::string label = prefix.empty() ? name : prefix + "." + name;
    if (value.is_object()) {
      add_rows(table, label, value);
    } else {
      std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      std::ranges::replace(text, '\n', ' ');
      table.row({label, std::move(text)});
    }
  }
}

Result<int> show(const CacheOptions& options, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_ASSIGN(listed, find_by_prefix(*store, options.key));
  json object = listed_json(listed);
  const auto entry = store->inspect(listed.key);
  if (!entry.ok()) {
    return Failure{ErrorKind::internal,
                   fmt::format("{} is defective: {}; `attune cache verify --quarantine` moves it away",
                               listed.path.string(), entry.failure().message)};
  }
  const json metadata = metadata_of(*entry);
  object["payload_bytes"] = entry->payload.size();
  object["payload_sha256"] = sha256(entry->payload).hex();
  object["metadata"] = metadata;
  if (text_of(metadata, "target").starts_with("sm_")) {
    ATTUNE_ASSIGN(cubin, cache::read_cubin(entry->payload));
    object["cubin"] = cubin_json(cubin);
  }
  if (as_json) {
    ATTUNE_TRY(print_json(object));
  } else {
    Table table;
    for (const char* name : {"key", "path", "bytes", "payload_bytes", "payload_sha256"}) {
      add_rows(table, "", {{name, object[name]}});
    }
    add_rows(table, "", metadata);
    if (object.contains("cubin")) add_rows(table, "cubin", object["cubin"]);
    ATTUNE_TRY(print(table.text()));
  }
  return kOk;
}

// ---- verify ----

Result<int> verify(const CacheOptions& options, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  const auto entries = store->list();
  json defects = json::array();
  std::string text;
  for (const cache::Listed& listed : entries) {
    const auto entry = store->inspect(listed.key);
    if (entry.ok()) continue;
    json defect = listed_json(listed);
    defect["defect"] = entry.failure().message;
    defect["quarantined"] = options.quarantine && store->quarantine(listed.key);
    text += fmt::format("{} {}: {}{}\n", paint("defective", Colour::red, Stream::out), listed.path.string(),
                        entry.failure().message, defect["quarantined"] ? " (moved to quarantine)" : "");
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

}  // namespace

void add_cache(CLI::App& app, Session& session) {
  auto options = std::make_shared<CacheOptions>();
  CLI::App* group = app.add_subcommand("cache", "What the cache on disk holds");
  group->require_subcommand(1);

  group->add_subcommand("list", "Every kernel")->callback([&session] {
    session.action = [&session] { return list(session.json); };
  });

  CLI::App* show_command = group->add_subcommand("show", "Everything known of one kernel");
  show_command->add_option("KEY", options->key, "Its key or the first digits of it")->required();
  show_command->callback(
      [options, &session] { session.action = [options, &session] { return show(*options, session.json); }; });

  CLI::App* verify_command =
      group->add_subcommand("verify", "Read every entry; exit 1 when one is defective");
  verify_command->add_flag("--quarantine", options->quarantine, "Move defective entries away");
  verify_command->callback([options, &session] {
    session.action = [options, &session] { return verify(*options, session.json); };
  });
}

}  // namespace attune::tools
