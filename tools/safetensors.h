// The .safetensors format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes.
// A file is data from anywhere: every claim of its header is checked before a byte of a tensor is reachable.
#pragma once

#include "base/result.h"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::tools {

/// Longest header that is accepted, as in the format's reference implementation.
inline constexpr std::size_t kMaxHeaderBytes = 100'000'000;

/// One tensor of a file, row-major.
struct StoredTensor {
  std::string name;
  std::string dtype;  // as the format spells it: "F32", "F16", "BF16", ...
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

/// A parsed file: owns the bytes that its tensors show. Moves keep the tensors valid, so it cannot be copied.
class SafetensorsFile {
 public:
  /// Checks and indexes a whole file. Fails with invalid_argument; `origin` (the path) begins the message.
  static Result<SafetensorsFile> parse(std::vector<std::byte> file, const std::string& origin);
  /// Reads `path`. A file that cannot be read is the caller's mistake: invalid_argument.
  static Result<SafetensorsFile> read(const std::filesystem::path& path);

  SafetensorsFile(SafetensorsFile&&) = default;
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

  /// In the order of their bytes.
  std::span<const StoredTensor> tensors() const { return tensors_; }
  /// Null when there is none of that name.
  const StoredTensor* find(std::string_view name) const;
  /// "__metadata__".
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  SafetensorsFile() = default;

  std::vector<std::byte> file_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// The bytes of a file with these tensors. Names must differ and sizes must fit shape and dtype
/// (invalid_argument).
Result<std::vector<std::byte>> encode_safetensors(std::span<const StoredTensor> tensors,
                                                  const std::map<std::string, std::string>& metadata);

/// Writes the file atomically: `path` is the whole new file, or what it was before.
Result<void> write_safetensors(const std::filesystem::path& path, std::span<const StoredTensor> tensors,
                               const std::map<std::string, std::string>& metadata);

}  // namespace attune::tools
