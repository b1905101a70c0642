#include "tools/safetensors.h"

#include "base/file.h"
#include "tools/output_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <utility>

namespace attune::tools {
namespace {

using nlohmann::json;

constexpr std::size_t kLengthBytes = 8;
constexpr const char* kMetadataName = "__metadata__";

struct StoredType {
  std::string_view name;
  std::int64_t bytes;
};

constexpr std::array kTypes{StoredType{"BOOL", 1},    StoredType{"U8", 1},      StoredType{"I8", 1},
                            StoredType{"F8_E4M3", 1}, StoredType{"F8_E5M2", 1}, StoredType{"F8_E8M0", 1},
                            StoredType{"I16", 2},     StoredType{"U16", 2},     StoredType{"F16", 2},
                            StoredType{"BF16", 2},    StoredType{"I32", 4},     StoredType{"U32", 4},
                            StoredType{"F32", 4},     StoredType{"I64", 8},     StoredType{"U64", 8},
                            StoredType{"F64", 8},     StoredType{"C64", 8}};

const StoredType* find_type(std::string_view name) {
  const auto* found = std::ranges::find(kTypes, name, &StoredType::name);
  return found == kTypes.end() ? nullptr : found;
}

/// A name as JSON writes it: quoted, with control characters escaped, so it is safe to print.
std::string printable(std::string_view name) {
  return json(name).dump(-1, ' ', false, json::error_handler_t::replace);
}

/// A tensor's place in the data part, as its header claims it.
struct Claim {
  StoredTensor tensor;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// The JSON header. nlohmann::json keeps the last of two equal names, so a callback looks for them.
Result<json> parse_header(std::string_view text) {
  std::vector<std::set<std::string>> names;  // of the objects that are open
  std::optional<std::string> duplicate;
  const auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key && !names.back().insert(parsed.get<std::string>()).second) {
      duplicate = parsed.get<std::string>();
    }
    return true;
  };
  json header = json::parse(text, watch, /*allow_exceptions=*/false);
  if (header.is_discarded()) return invalid_argument("the header is not valid JSON");
  if (!header.is_object()) return invalid_argument("the header is JSON, but not an object");
  if (duplicate) return invalid_argument(fmt::format("the header has {} twice", printable(*duplicate)));
  return header;
}

Result<std::map<std::string, std::string>> parse_metadata(const json& object) {
  if (!object.is_object()) return invalid_argument(fmt::format("{} is not an object", kMetadataName));
  std::map<std::string, std::string> metadata;
  for (const auto& [name, value] : object.items()) {
    if (!value.is_string()) {
      return invalid_argument(fmt::format("{}: the value of {} is not text", kMetadataName, printable(name)));
    }
    metadata.emplace(name, value.get<std::string>());
  }
  return metadata;
}

/// A non-negative integer that fits an int64: an extent or an offset.
std::optional<std::int64_t> natural(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto number = value.get<std::uint64_t>();
  if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return std::nullopt;
  return static_cast<std::int64_t>(number);
}

/// Bytes of a row-major tensor; nothing when they overflow.
std::optional<std::int64_t> bytes_of(const StoredType& type, std::span<const std::int64_t> shape) {
  std::int64_t bytes = type.bytes;
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return bytes;
}

Result<Claim> parse_claim(const std::string& name, const json& object, std::uint64_t data_bytes) {
  const auto refuse = [&](const std::string& what) {
    return invalid_argument(fmt::format("tensor {}: {}", printable(name), what));
  };
  if (!object.is_object()) return refuse("its entry is not an object");
  for (const char* field : {"dtype", "shape", "data_offsets"}) {
    if (!object.contains(field)) return refuse(fmt::format("{} is missing", field));
  }

  Claim claim;
  claim.tensor.name = name;
  const json& dtype = object["dtype"];
  const StoredType* type = dtype.is_string() ? find_type(dtype.get_ref<const std::string&>()) : nullptr;
  if (type == nullptr) return refuse(fmt::format("unknown dtype {}", dtype.dump()));
  claim.tensor.dtype = type->name;

  const json& shape = object["shape"];
  if (!shape.is_array()) return refuse("shape is not an array");
  for (const json& extent : shape) {
    const auto size = natural(extent);
    if (!size) return refuse(fmt::format("shape holds {}, expected integers >= 0", extent.dump()));
    claim.tensor.shape.push_back(*size);
  }
  const auto bytes = bytes_of(*type, claim.tensor.shape);
  if (!bytes) return refuse(fmt::format("shape [{}] overflows", fmt::join(claim.tensor.shape, ", ")));

  const json& offsets = object["data_offsets"];
  const bool is_pair =
      offsets.is_array() && offsets.size() == 2 && natural(offsets[0]) && natural(offsets[1]);
  if (!is_pair) return refuse("data_offsets are not two integers >= 0");
  claim.begin = offsets[0].get<std::uint64_t>();
  claim.end = offsets[1].get<std::uint64_t>();
  if (claim.begin > claim.end) {
    return refuse(fmt::format("data_offsets [{}, {}] end before they begin", claim.begin, claim.end));
  }
  if (claim.end > data_bytes) {
    return refuse(fmt::format("data_offsets [{}, {}] go beyond the {} bytes of data", claim.begin, claim.end,
                              data_bytes));
  }
  if (claim.end - claim.begin != static_cast<std::uint64_t>(*bytes)) {
    return refuse(fmt::format("data_offsets span {} bytes, but {} [{}] takes {}", claim.end - claim.begin,
                              type->name, fmt::join(claim.tensor.shape, ", "), *bytes));
  }
  return claim;
}

/// The format wants the data part covered exactly once.
Result<void> check_cover(std::span<const Claim> sorted, std::uint64_t data_bytes) {
  std::uint64_t covered = 0;
  for (const Claim& claim : sorted) {
    if (claim.begin < covered) {
      return invalid_argument(
          fmt::format("tensor {}: its data overlaps the tensor before it", printable(claim.tensor.name)));
    }
    if (claim.begin > covered) {
      return invalid_argument(fmt::format("tensor {}: a hole of {} bytes before its data",
                                          printable(claim.tensor.name), claim.begin - covered));
    }
    covered = claim.end;
  }
  if (covered != data_bytes) {
    return invalid_argument(
        fmt::format("{} bytes after the last tensor belong to none", data_bytes - covered));
  }
  return done();
}

Result<std::size_t> header_length(std::span<const std::byte> file) {
  if (file.size() < kLengthBytes) {
    return invalid_argument(fmt::format("{} bytes are too few for a .safetensors file", file.size()));
  }
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(file[i]);
  if (length > kMaxHeaderBytes) {
    return invalid_argument(
        fmt::format("header length {} is above the format's limit of {}; is this a "
                    ".safetensors file?",
                    length, kMaxHeaderBytes));
  }
  if (length > file.size() - kLengthBytes) {
    return invalid_argument(fmt::format("header length {} goes beyond the file's {} bytes; is it truncated?",
                                        length, file.size()));
  }
  return static_cast<std::size_t>(length);
}

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

struct Index {
  std::vector<StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

Result<Index> index_of(std::span<const std::byte> file) {
  ATTUNE_ASSIGN(length, header_length(file));
  ATTUNE_ASSIGN(header, parse_header(text_of(file.subspan(kLengthBytes, length))));
  const std::span<const std::byte> data = file.subspan(kLengthBytes + length);

  Index index;
  std::vector<Claim> claims;
  for (const auto& [name, object] : header.items()) {
    if (name == kMetadataName) {
      ATTUNE_ASSIGN(metadata, parse_metadata(object));
      index.metadata = std::move(metadata);
    } else {
      ATTUNE_ASSIGN(claim, parse_claim(name, object, data.size()));
      claims.push_back(std::move(claim));
    }
  }
  std::ranges::sort(claims, {}, [](const Claim& claim) { return std::pair(claim.begin, claim.end); });
  ATTUNE_TRY(check_cover(claims, data.size()));
  for (Claim& claim : claims) {
    claim.tensor.bytes = data.subspan(claim.begin, claim.end - claim.begin);
    index.tensors.push_back(std::move(claim.tensor));
  }
  return index;
}

}  // namespace

Result<SafetensorsFile> SafetensorsFile::parse(std::vector<std::byte> file, const std::string& origin) {
  SafetensorsFile result;
  result.file_ = std::move(file);
  auto index = index_of(result.file_);
  if (!index.ok()) return invalid_argument(fmt::format("{}: {}", origin, index.failure().message));
  result.tensors_ = std::move(index->tensors);
  result.metadata_ = std::move(index->metadata);
  return result;
}

Result<SafetensorsFile> SafetensorsFile::read(const std::filesystem::path& path) {
  auto bytes = read_file(path);
  if (!bytes.ok()) return invalid_argument(bytes.failure().message);
  return parse(std::move(*bytes), path.string());
}

const StoredTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::ranges::find(tensors_, name, &StoredTensor::name);
  return found == tensors_.end() ? nullptr : &*found;
}

Result<std::vector<std::byte>> encode_safetensors(std::span<const StoredTensor> tensors,
                                                  const std::map<std::string, std::string>& metadata) {
  // Wide elements first, so that every tensor is aligned for its type without a hole.
  std::vector<const StoredTensor*> order;
  for (const StoredTensor& tensor : tensors) {
    const StoredType* type = find_type(tensor.dtype);
    const auto bytes = type == nullptr ? std::nullopt : bytes_of(*type, tensor.shape);
    if (!bytes || static_cast<std::size_t>(*bytes) != tensor.bytes.size()) {
      return invalid_argument(fmt::format("tensor {}: {} bytes do not fit {} [{}]", printable(tensor.name),
                                          tensor.bytes.size(), tensor.dtype, fmt::join(tensor.shape, ", ")));
    }
    order.push_back(&tensor);
  }
  std::ranges::stable_sort(order, std::ranges::greater(),
                           [](const StoredTensor* tensor) { return find_type(tensor->dtype)->bytes; });

  json header = json::object();
  if (!metadata.empty()) header[kMetadataName] = metadata;
  std::size_t end = 0;
  for (const StoredTensor* tensor : order) {
    const std::size_t begin = std::exchange(end, end + tensor->bytes.size());
    json entry{{"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {begin, end}}};
    if (!header.emplace(tensor->name, std::move(entry)).second) {
      return invalid_argument(fmt::format("two tensors are called {}", printable(tensor->name)));
    }
  }
  std::string text = header.dump(-1, ' ', false, json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the format allows spaces; the data part starts aligned

  std::vector<std::byte> file(kLengthBytes + text.size() + end);
  for (std::size_t i = 0; i < kLengthBytes; ++i) file[i] = static_cast<std::byte>(text.size() >> (8 * i));
  auto out = std::ranges::copy(std::as_bytes(std::span(text)), file.begin() + kLengthBytes).out;
  for (const StoredTensor* tensor : order) out = std::ranges::copy(tensor->bytes, out).out;
  return file;
}

Result<void> write_safetensors(const std::filesystem::path& path, std::span<const StoredTensor> tensors,
                               const std::map<std::string, std::string>& metadata) {
  ATTUNE_ASSIGN(bytes, encode_safetensors(tensors, metadata));
  return write_output_file(path, bytes);
}

}  // namespace attune::tools
