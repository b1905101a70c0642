// What the `attune cache` commands share: which cache, which entry, and what an entry's metadata says of it.
#pragma once

#include "base/result.h"
#include "cache/store.h"
#include "tools/table.h"

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace attune::tools {

/// Digits of a key that tables show.
inline constexpr std::size_t kShortKey = 8;

/// The cache of this process. Fails with environment when it has no folder.
Result<cache::Store*> open_store();

/// The one entry whose key begins with `prefix`. Fails with invalid_argument for none and for several.
Result<cache::Listed> find_by_prefix(const cache::Store& store, const std::string& prefix);

/// That entry and what it holds. Fails with internal when it is defective.
Result<std::pair<cache::Listed, cache::Entry>> find_whole(const cache::Store& store,
                                                          const std::string& prefix);

/// What the kernel's makers wrote about it; an empty object if it is none of ours.
nlohmann::json metadata_of(const cache::Entry& entry);

/// Is the entry no kernel but a choice of `attune bench --tune`?
bool is_tuned_choice(const nlohmann::json& metadata);

/// A field as text for people, without control characters; "?" when it is missing.
std::string text_of(const nlohmann::json& object, const char* name);

/// "f16 K=64 Kv=72 packed right lse": what tells kernels of one family apart.
std::string spec_text(const nlohmann::json& metadata);

/// Key, path, bytes and times.
nlohmann::json listed_json(const cache::Listed& listed);

/// Nested objects as "outer.inner" rows, for people.
void add_rows(Table& table, const std::string& prefix, const nlohmann::json& object);

/// Seconds since a Unix time, at least 0.
std::int64_t seconds_since(std::int64_t unix_time);

}  // namespace attune::tools
