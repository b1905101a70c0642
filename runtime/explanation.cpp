#include "runtime/explanation.h"

#include "codegen/names.h"

#include <nlohmann/json.hpp>

#include <type_traits>

namespace attune::runtime {

using nlohmann::json;

json spec_json(const kernel::KernelSpec& spec) {
  json object = json::object();
  kernel::for_each_field(spec, [&](const char* name, const auto& value) {
    if constexpr (codegen::NamedEnum<std::remove_cvref_t<decltype(value)>>) {
      object[name] = codegen::name_of(value);
    } else {
      object[name] = value;
    }
  });
  return object;
}

json to_json(const Explanation& e) {
  json verdicts = json::array();
  for (const auto& verdict : e.choice.verdicts) {
    verdicts.push_back({{"family", codegen::name_of(verdict.family)}, {"reasons", verdict.reasons}});
  }
  json object{{"problem", codegen::to_string(e.problem)},
              {"target", e.unit.arch.target},
              {"family", codegen::name_of(e.choice.spec.family)},
              {"candidate", e.choice.candidate->name},
              {"spec", spec_json(e.choice.spec)},
              {"shared_bytes", codegen::shared_bytes(e.choice.spec)},
              {"verdicts", verdicts},
              {"source", e.unit.source},
              {"state", e.state}};
  if (!e.layer.empty()) object["layer"] = e.layer;
  if (e.tuned) object["tuned"] = to_json(*e.tuned);
  if (!e.compiler_problem.empty()) {
    object["key"] = nullptr;
    object["compiler_problem"] = e.compiler_problem;
    return object;
  }
  object["key"] = e.unit.key.hex();
  object["compiler"] = e.unit.compiler.name;
  object["key_fields"] = json::object();
  for (const auto& [tag, value] : codegen::key_fields(e.unit)) object["key_fields"][tag] = value;
  return object;
}

}  // namespace attune::runtime
