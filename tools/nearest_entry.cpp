#include "tools/nearest_entry.h"

#include "tools/cache_entries.h"
#include "tools/cache_filter.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>
#include <sstream>
#include <tuple>

namespace attune::tools {
namespace {

using nlohmann::json;

std::string field_of(const KeyFields& fields, const std::string& tag) {
  const auto found = fields.find(tag);
  return found == fields.end() ? std::string() : found->second;
}

std::set<std::string> words_of(const std::string& text) {
  std::istringstream words(text);
  return {std::istream_iterator<std::string>(words), {}};
}

/// "dtype=f16 head_dim=64" by names.
KeyFields spec_fields(const std::string& spec) {
  KeyFields fields;
  for (const std::string& word : words_of(spec)) {
    const std::size_t equals = word.find('=');
    if (equals != std::string::npos) fields["spec." + word.substr(0, equals)] = word.substr(equals + 1);
  }
  return fields;
}

void compare(const KeyFields& cached, const KeyFields& wanted, std::vector<Difference>& found) {
  KeyFields all = cached;
  all.insert(wanted.begin(), wanted.end());
  for (const auto& [tag, value] : all) {
    const Difference difference{tag, field_of(cached, tag), field_of(wanted, tag)};
    if (difference.cached != difference.wanted) found.push_back(difference);
  }
}

/// Of two lists of options those that only one has.
Difference compare_options(const std::string& cached, const std::string& wanted) {
  const auto only_in = [](const std::set<std::string>& one, const std::set<std::string>& other) {
    std::string text;
    for (const std::string& word : one) {
      if (!other.contains(word)) text += (text.empty() ? "" : " ") + word;
    }
    return text;
  };
  const auto a = words_of(cached);
  const auto b = words_of(wanted);
  return {"options", only_in(a, b), only_in(b, a)};
}

KeyFields key_fields_of(const json& metadata) {
  KeyFields fields;
  const json stored = metadata.value("key_fields", json::object());
  for (const auto& [tag, value] : stored.items()) {
    if (value.is_string()) fields[tag] = value.get<std::string>();
  }
  return fields;
}

}  // namespace

std::vector<Difference> differences(const KeyFields& cached, const KeyFields& wanted) {
  std::vector<Difference> found;
  compare(spec_fields(field_of(cached, "spec")), spec_fields(field_of(wanted, "spec")), found);
  const bool same_target = field_of(cached, "target") == field_of(wanted, "target");
  const bool same_spec = found.empty();
  KeyFields a = cached;
  KeyFields b = wanted;
  for (KeyFields* fields : {&a, &b}) {
    fields->erase("spec");
    if (!same_spec || !same_target) fields->erase("source");
    fields->erase("options");
  }
  compare(a, b, found);
  if (same_target && field_of(cached, "options") != field_of(wanted, "options")) {
    found.push_back(compare_options(field_of(cached, "options"), field_of(wanted, "options")));
  }
  return found;
}

std::optional<NearestEntry> nearest_entry(const cache::Store& store, const codegen::Unit& unit) {
  KeyFields wanted;
  for (const auto& [tag, value] : codegen::key_fields(unit)) wanted[tag] = value;
  std::optional<NearestEntry> nearest;
  const auto rank = [](const NearestEntry& entry) {
    return std::tuple(entry.differences.size(), -entry.file.used_unix);
  };
  for (const CachedKernel& kernel : cached_kernels(store)) {
    const KeyFields cached = key_fields_of(kernel.metadata);
    if (cached.empty()) continue;
    NearestEntry entry{kernel.file, text_of(kernel.metadata, "candidate"), differences(cached, wanted)};
    if (!nearest || rank(entry) < rank(*nearest)) nearest = std::move(entry);
  }
  return nearest;
}

}  // namespace attune::tools
