#include "runtime/cuda/build_id.h"

#include "base/descriptor.h"

#include <fmt/format.h>

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <system_error>
#include <vector>

namespace attune::runtime {
namespace {

constexpr std::size_t kMostNotes = 65536;  // bytes of a segment that is believed to hold notes

constexpr std::size_t padded(std::size_t size) {
  return (size + 3) / 4 * 4;
}

/// The build id among the notes of a PT_NOTE segment, or "".
std::string find_in_notes(std::span<const std::byte> notes) {
  constexpr char kOwner[] = "GNU";
  while (notes.size() >= sizeof(ElfW(Nhdr))) {
    ElfW(Nhdr) header;
    std::memcpy(&header, notes.data(), sizeof(header));
    const std::size_t name = sizeof(header);
    const std::size_t content = name + padded(header.n_namesz);
    const std::size_t end = content + padded(header.n_descsz);
    if (end > notes.size()) break;
    if (header.n_type == NT_GNU_BUILD_ID && header.n_namesz == sizeof(kOwner) &&
        std::memcmp(notes.data() + name, kOwner, sizeof(kOwner)) == 0) {
      std::string text;
      for (const std::byte byte : notes.subspan(content, header.n_descsz)) {
        text += fmt::format("{:02x}", std::to_integer<unsigned>(byte));
      }
      return text;
    }
    notes = notes.subspan(end);
  }
  return "";
}

struct Query {
  const void* base;
  std::string id;
};

int visit_library(dl_phdr_info* info, std::size_t, void* data) {
  auto& query = *static_cast<Query*>(data);
  const auto* base = reinterpret_cast<const std::byte*>(info->dlpi_addr);
  if (base != query.base) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_NOTE || !query.id.empty()) continue;
    query.id = find_in_notes({base + segment.p_vaddr, segment.p_memsz});
  }
  return 1;
}

}  // namespace

std::string build_id(const void* base, const std::string& path) {
  Query query{base, ""};
  dl_iterate_phdr(visit_library, &query);
  if (!query.id.empty()) return query.id;
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? "unknown" : fmt::format("{} bytes", size);
}

std::string build_id_in(const std::filesystem::path& file) {
  const Descriptor library(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  const auto read = [&](std::uint64_t offset, void* to, std::size_t size) {
    return ::pread(library.get(), to, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size);
  };
  ElfW(Ehdr) header{};
  if (!read(0, &header, sizeof header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  for (std::size_t i = 0; i < header.e_phnum; ++i) {
    ElfW(Phdr) segment{};
    if (!read(header.e_phoff + i * sizeof segment, &segment, sizeof segment)) return "";
    if (segment.p_type != PT_NOTE || segment.p_filesz > kMostNotes) continue;
    std::vector<std::byte> notes(segment.p_filesz);
    if (!read(segment.p_offset, notes.data(), notes.size())) return "";
    if (std::string id = find_in_notes(notes); !id.empty()) return id;
  }
  return "";
}

}  // namespace attune::runtime
