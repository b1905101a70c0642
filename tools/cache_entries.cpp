#include "tools/cache_entries.h"

#include "runtime/engine.h"
#include "tools/console.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

namespace attune::tools {

using nlohmann::json;

Result<cache::Store*> open_store() {
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  cache::Store& store = engine->store();
  if (store.root().empty())
    return environment_failure("there is no cache folder: set ATTUNE_CACHE_DIR or HOME");
  return &store;
}

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

Result<std::pair<cache::Listed, cache::Entry>> find_whole(const cache::Store& store,
                                                          const std::string& prefix) {
  ATTUNE_ASSIGN(listed, find_by_prefix(store, prefix));
  auto entry = store.inspect(listed.key);
  if (!entry.ok()) {
    return internal_failure(
        fmt::format("{} is defective: {}; `attune cache verify --quarantine` moves it away",
                    listed.path.string(), entry.failure().message));
  }
  return std::pair{std::move(listed), std::move(*entry)};
}

json metadata_of(const cache::Entry& entry) {
  json metadata = json::parse(entry.metadata_json, nullptr, /*allow_exceptions=*/false);
  return metadata.is_object() ? metadata : json::object();
}

bool is_tuned_choice(const json& metadata) {
  return text_of(metadata, "kind") == runtime::kTunedChoiceKind;
}

std::string text_of(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end()) return "?";
  return printable(found->is_string() ? found->get<std::string>() : found->dump());
}

std::string spec_text(const json& metadata) {
  const json spec = metadata.value("spec", json::object());
  const auto is = [&](const char* field, const char* value) { return text_of(spec, field) == value; };
  const auto is_set = [&](const char* field) { return !is(field, "none") && !is(field, "?"); };
  const auto differs = [&](const char* a, const char* b) { return text_of(spec, a) != text_of(spec, b); };
  std::string text = fmt::format("{} K={}", text_of(spec, "dtype"), text_of(spec, "head_dim"));
  if (differs("head_dim_v", "head_dim")) text += " Kv=" + text_of(spec, "head_dim_v");
  if (differs("output_dtype", "dtype")) text += " to " + text_of(spec, "output_dtype");
  if (is("blocks", "varlen")) text += is("keys", "paged") ? " paged" : " packed";
  if (is("window_left", "bounded")) text += " left";
  if (is("window_right", "bounded")) text += " right";
  if (is_set("bias")) text += " bias=" + text_of(spec, "bias");
  if (is("dropout", "on")) text += " dropout";
  if (is("lse", "write")) text += " lse";
  return text;
}

json listed_json(const cache::Listed& listed) {
  return {{"key", listed.key.hex()},
          {"path", listed.path.string()},
          {"bytes", listed.bytes},
          {"modified_unix", listed.modified_unix},
          {"used_unix", listed.used_unix}};
}

void add_rows(Table& table, const std::string& prefix, const json& object) {
  for (const auto& [name, value] : object.items()) {
    const std::string label = printable(prefix.empty() ? name : fmt::format("{}.{}", prefix, name));
    if (value.is_object()) {
      add_rows(table, label, value);
    } else {
      std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      std::ranges::replace(text, '\n', ' ');  // compiler options are one to a line
      table.row({label, printable(text)});
    }
  }
}

std::int64_t seconds_since(std::int64_t unix_time) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::max<std::int64_t>(0, std::chrono::duration_cast<std::chrono::seconds>(now).count() - unix_time);
}

}  // namespace attune::tools
