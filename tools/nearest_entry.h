// Why a kernel is not in the cache: the entry that is most like it, and what differs.
#pragma once

#include "cache/store.h"
#include "codegen/unit.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace attune::tools {

/// Fields of a key by their tags.
using KeyFields = std::map<std::string, std::string>;

struct Difference {
  std::string field;   // a tag of codegen::key_fields, or "spec." and a field of the spec
  std::string cached;  // empty: the other one alone has it
  std::string wanted;
};

/// What differs, without what only follows from that: another spec or target has another source.
std::vector<Difference> differences(const KeyFields& cached, const KeyFields& wanted);

struct NearestEntry {
  cache::Listed file;
  std::string candidate;
  std::vector<Difference> differences;
};

/// The entry with the fewest differences; of equal ones the one that was used last. Nothing where no entry
/// says what its key is made of.
std::optional<NearestEntry> nearest_entry(const cache::Store& store, const codegen::Unit& unit);

}  // namespace attune::tools
