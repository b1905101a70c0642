// A choice among candidates that `attune bench --tune` measured on a device. The cache keeps it as an entry
// without a payload.
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "cache/entry.h"
#include "codegen/embedded.h"
#include "codegen/problem.h"
#include "runtime/backend.h"

#include <nlohmann/json_fwd.hpp>

#include <span>
#include <string>
#include <vector>

namespace attune::runtime {

struct TunedChoice {
  struct Timing {
    std::string candidate;
    double microseconds = 0;
  };
  std::string candidate;        // that runs from now on
  std::vector<Timing> timings;  // of all, the usual choice first
  std::string measured_on;      // the extents, for people
};

/// What an entry's metadata has under "kind": kernels have no such field.
inline constexpr const char* kTunedChoiceKind = "tuned choice";

/// The key of a problem's choice on a device. It covers this version, the templates and the candidates: what
/// was measured among other kernels is not found.
Digest tuned_key(const codegen::Problem& problem, const Backend& backend,
                 std::span<const codegen::EmbeddedFile> templates);

cache::Entry tuned_entry(const Digest& key, const TunedChoice& choice, const codegen::Problem& problem,
                         const Backend& backend);
/// The inverse. Fails with environment where the metadata is none of a choice.
Result<TunedChoice> tuned_choice_of(const cache::Entry& entry);

nlohmann::json to_json(const TunedChoice& choice);

}  // namespace attune::runtime
