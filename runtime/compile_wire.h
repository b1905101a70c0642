// What a compiler in a process of its own is asked and answers, as bytes. Both sides are of one build.
#pragma once

#include "base/result.h"
#include "codegen/unit.h"
#include "runtime/backend.h"

#include <optional>
#include <string>
#include <string_view>

namespace attune::runtime {

struct CompileRequest {
  codegen::Unit unit;   // without its key; its headers are views of the message
  std::string library;  // the NVRTC that compiles it; empty for Clang
};

std::string encode_request(const codegen::Unit& unit, const std::string& library);
/// Fails with environment when the message is cut off or of another build.
Result<CompileRequest> decode_request(std::string_view message);

std::string encode_answer(const Result<Image>& answer);
/// What was answered, or nothing when the message is not a whole answer.
std::optional<Result<Image>> decode_answer(std::string_view message);

}  // namespace attune::runtime
