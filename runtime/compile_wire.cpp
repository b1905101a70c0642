#include "runtime/compile_wire.h"

#include "attune/version.h"
#include "base/byte_fields.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

namespace attune::runtime {
namespace {

// A message is a list of fields, each its size in 8 bytes and its bytes; a field may be a list in turn.
using Fields = std::vector<std::string_view>;

constexpr std::size_t kSizeBytes = 8;
constexpr std::string_view kImage = "image";

static_assert(std::is_trivially_copyable_v<kernel::KernelSpec>);

std::string encode(const Fields& fields) {
  std::string message;
  for (const std::string_view field : fields) {
    std::array<std::byte, kSizeBytes> size{};
    store_number(size, 0, kSizeBytes, field.size());
    message.append(reinterpret_cast<const char*>(size.data()), kSizeBytes).append(field);
  }
  return message;
}

std::optional<Fields> decode(std::string_view message) {
  Fields fields;
  while (!message.empty()) {
    if (message.size() < kSizeBytes) return std::nullopt;
    const std::uint64_t size = load_number(std::as_bytes(std::span(message)), 0, kSizeBytes);
    message.remove_prefix(kSizeBytes);
    if (size > message.size()) return std::nullopt;
    fields.push_back(message.substr(0, size));
    message.remove_prefix(size);
  }
  return fields;
}

std::string_view text_of(const kernel::KernelSpec& spec) {
  return {reinterpret_cast<const char*>(&spec), sizeof spec};
}

}  // namespace

std::string encode_request(const codegen::Unit& unit, const std::string& library) {
  Fields headers;
  for (const codegen::EmbeddedFile& header : unit.headers) {
    headers.push_back(header.name);
    headers.push_back(header.text);
  }
  const Fields options(unit.compiler.options.begin(), unit.compiler.options.end());
  return encode({ATTUNE_VERSION, library, unit.arch.target, text_of(unit.spec), unit.source,
                 unit.compiler.name, encode(options), encode(headers)});
}

Result<CompileRequest> decode_request(std::string_view message) {
  const Failure foreign = environment_failure(
      "the request is of another build of Attune: install the library and "
      "attune-compile from one build");
  const auto fields = decode(message);
  if (!fields || fields->size() != 8) return foreign;
  const auto options = decode((*fields)[6]), headers = decode((*fields)[7]);
  const std::string_view spec = (*fields)[3];
  if ((*fields)[0] != ATTUNE_VERSION || spec.size() != sizeof(kernel::KernelSpec)) return foreign;
  if (!options || !headers || headers->size() % 2 != 0) return foreign;
  ATTUNE_ASSIGN(arch, codegen::arch_from_name((*fields)[2]));
  CompileRequest request;
  request.library = (*fields)[1];
  request.unit.arch = std::move(arch);
  std::memcpy(&request.unit.spec, spec.data(), spec.size());
  request.unit.source = (*fields)[4];
  request.unit.compiler = {std::string((*fields)[5]), {options->begin(), options->end()}};
  for (std::size_t i = 0; i < headers->size(); i += 2)
    request.unit.headers.push_back(codegen::file_with_digest((*headers)[i], (*headers)[i + 1]));
  return request;
}

std::string encode_answer(const Result<Image>& answer) {
  if (!answer.ok()) {
    const std::string kind = std::to_string(static_cast<int>(answer.failure().kind));
    return encode({kind, answer.failure().message});
  }
  const auto* bytes = reinterpret_cast<const char*>(answer->bytes.data());
  return encode({kImage, answer->metadata_json, {bytes, answer->bytes.size()}});
}

std::optional<Result<Image>> decode_answer(std::string_view message) {
  const auto fields = decode(message);
  if (!fields) return std::nullopt;
  if (fields->size() == 3 && fields->front() == kImage) {
    const auto bytes = std::as_bytes(std::span((*fields)[2]));
    return Image{{bytes.begin(), bytes.end()}, std::string((*fields)[1])};
  }
  constexpr std::array kKinds{ErrorKind::invalid_argument, ErrorKind::unsupported, ErrorKind::environment,
                              ErrorKind::internal};
  const auto kind = std::ranges::find_if(kKinds, [&](ErrorKind known) {
    return !fields->empty() && fields->front() == std::to_string(static_cast<int>(known));
  });
  if (fields->size() != 2 || kind == kKinds.end()) return std::nullopt;
  return Result<Image>(Failure{*kind, std::string((*fields)[1])});
}

}  // namespace attune::runtime
