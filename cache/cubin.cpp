#include "cache/cubin.h"

#include <fmt/format.h>

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <string_view>
#include <type_traits>

namespace attune::cache {
namespace {

using Bytes = std::span<const std::byte>;

constexpr std::uint8_t kEntryFlag = 0x10;  // in st_other of a kernel's symbol; a device function lacks it
/// Longer names are refused, or many sections that share one long name would cost the square of the file's
/// size.
constexpr std::size_t kMaxNameBytes = 4096;
/// From sm_90 on, .nv.shared.<kernel> begins with what the driver keeps for itself.
constexpr int kReservedSharedBytes = 1024;
constexpr int kFirstSmWithReserved = 90;

// Records of .nv.info and .nv.info.<kernel>: format (1), attribute (1), then two bytes that are the value or,
// for kSizedFormat, the length of the value that follows.
constexpr std::uint8_t kByteFormat = 2;
constexpr std::uint8_t kSizedFormat = 4;
constexpr std::uint8_t kMaxThreads = 0x05;     // sized: x, y, z
constexpr std::uint8_t kFrameSize = 0x11;      // sized: symbol, bytes
constexpr std::uint8_t kParameter = 0x17;      // sized: index, number and offset of 16 bits each, bytes << 18
constexpr std::uint8_t kRegisterCount = 0x2f;  // sized: symbol, registers
constexpr std::uint8_t kBarrierCount = 0x4c;   // byte; since CUDA 13

constexpr unsigned kParameterBytesShift = 18;

/// Up to CUDA 12, seven bits of .text.<kernel>'s flags count the barriers.
constexpr unsigned kBarrierFlagShift = 20;
constexpr std::uint64_t kBarrierFlagMask = 0x7f;

/// CUDA 13's ABI version of a cubin; 7 before.
constexpr unsigned kNewAbi = 8;

Failure defect(std::string what) {
  return invalid_argument("not a readable cubin: " + std::move(what));
}

Result<Bytes> slice(Bytes bytes, std::uint64_t offset, std::uint64_t size, std::string_view what) {
  if (offset > bytes.size() || size > bytes.size() - offset) {
    return defect(fmt::format("{} is bytes {}+{} of {}", what, offset, size, bytes.size()));
  }
  return bytes.subspan(offset, size);
}

/// The struct at `offset`, which the caller has checked to be inside; a file's bytes need not be aligned.
template <typename T>
T load(Bytes bytes, std::size_t offset = 0) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

Result<std::string> name_at(Bytes strings, std::uint64_t offset) {
  if (offset >= strings.size())
    return defect(fmt::format("a name starts at {} of {} bytes", offset, strings.size()));
  const Bytes rest = strings.subspan(offset, std::min(strings.size() - offset, kMaxNameBytes));
  const auto end = std::ranges::find(rest, std::byte{0});
  if (end == rest.end()) return defect("a name has no end");
  return std::string(reinterpret_cast<const char*>(rest.data()),
                     static_cast<std::size_t>(end - rest.begin()));
}

struct Section {
  std::string name;
  Elf64_Shdr header{};
  Bytes data;  // empty for a section that takes no room in the file
};

Result<Elf64_Ehdr> read_header(Bytes file) {
  if (file.size() < sizeof(Elf64_Ehdr)) return defect(fmt::format("{} bytes are no ELF file", file.size()));
  const auto header = load<Elf64_Ehdr>(file);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return defect("it is no ELF file");
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB ||
      header.e_machine != EM_CUDA) {
    return defect(fmt::format("it is an ELF file for machine {}, not 64-bit CUDA", header.e_machine));
  }
  if (header.e_shentsize != sizeof(Elf64_Shdr) || header.e_shstrndx >= header.e_shnum) {
    return defect("its section table is malformed");
  }
  return header;
}

Result<std::vector<Section>> read_sections(Bytes file, const Elf64_Ehdr& elf) {
  ATTUNE_ASSIGN(
      table, slice(file, elf.e_shoff, std::uint64_t{elf.e_shnum} * sizeof(Elf64_Shdr), "the section table"));
  std::vector<Section> sections(elf.e_shnum);
  for (std::size_t i = 0; i < sections.size(); ++i) {
    Section& section = sections[i];
    section.header = load<Elf64_Shdr>(table, i * sizeof(Elf64_Shdr));
    if (section.header.sh_type == SHT_NULL || section.header.sh_type == SHT_NOBITS) continue;
    ATTUNE_ASSIGN(
        data, slice(file, section.header.sh_offset, section.header.sh_size, fmt::format("section {}", i)));
    section.data = data;
  }
  const Bytes names = sections[elf.e_shstrndx].data;
  for (Section& section : sections) {
    if (section.header.sh_type == SHT_NULL) continue;
    ATTUNE_ASSIGN(name, name_at(names, section.header.sh_name));
    section.name = std::move(name);
  }
  return sections;
}

bool has_new_abi(const Elf64_Ehdr& elf) {
  return elf.e_ident[EI_ABIVERSION] >= kNewAbi;
}

/// The compute capability, which the new ABI moved up a byte.
int sm_of(const Elf64_Ehdr& elf) {
  const unsigned shift = has_new_abi(elf) ? 8 : 0;
  return static_cast<int>(elf.e_flags >> shift & 0xff);
}

/// Kernels by the index of their symbol.
using Kernels = std::map<std::uint32_t, CubinKernel>;

Result<Kernels> read_kernels(const std::vector<Section>& sections) {
  Kernels kernels;
  const auto table =
      std::ranges::find(sections, SHT_SYMTAB, [](const Section& s) { return s.header.sh_type; });
  if (table == sections.end()) return kernels;
  if (table->header.sh_link >= sections.size()) return defect("its symbol table has no names");
  const Bytes names = sections[table->header.sh_link].data;
  for (std::size_t i = 0; i < table->data.size() / sizeof(Elf64_Sym); ++i) {
    const auto symbol = load<Elf64_Sym>(table->data, i * sizeof(Elf64_Sym));
    if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || (symbol.st_other & kEntryFlag) == 0) continue;
    ATTUNE_ASSIGN(name, name_at(names, symbol.st_name));
    kernels[static_cast<std::uint32_t>(i)] = {.name = std::move(name), .code_bytes = symbol.st_size};
  }
  return kernels;
}

struct Attribute {
  std::uint8_t format = 0;
  std::uint8_t id = 0;
  std::uint8_t byte = 0;  // the value of kByteFormat
  Bytes value;            // of kSizedFormat

  bool sized(std::uint8_t attribute, std::size_t words) const {
    return format == kSizedFormat && id == attribute && value.size() >= words * sizeof(std::uint32_t);
  }
  std::uint32_t word(std::size_t i) const { return load<std::uint32_t>(value, i * sizeof(std::uint32_t)); }
};

Result<std::vector<Attribute>> read_attributes(const Section& section) {
  constexpr std::size_t kRecordBytes = 4;
  std::vector<Attribute> attributes;
  for (Bytes rest = section.data; !rest.empty();) {
    ATTUNE_ASSIGN(record, slice(rest, 0, kRecordBytes, "a record of " + section.name));
    Attribute attribute{.format = load<std::uint8_t>(record, 0),
                        .id = load<std::uint8_t>(record, 1),
                        .byte = load<std::uint8_t>(record, 2),
                        .value = {}};
    rest = rest.subspan(kRecordBytes);
    if (attribute.format == kSizedFormat) {
      ATTUNE_ASSIGN(value, slice(rest, 0, load<std::uint16_t>(record, 2), "a value of " + section.name));
      attribute.value = value;
      rest = rest.subspan(value.size());
    }
    attributes.push_back(attribute);
  }
  return attributes;
}

Result<int> count(std::uint64_t value, const char* what) {
  constexpr std::uint64_t kMostPlausible = 1U << 30;
  if (value > kMostPlausible) return defect(fmt::format("{} {}", value, what));
  return static_cast<int>(value);
}

/// .nv.info: attributes of all kernels, each with its symbol.
Result<void> read_shared_attributes(const Section& section, Kernels& kernels) {
  ATTUNE_ASSIGN(attributes, read_attributes(section));
  for (const Attribute& attribute : attributes) {
    if (!attribute.sized(kRegisterCount, 2) && !attribute.sized(kFrameSize, 2)) continue;
    const auto kernel = kernels.find(attribute.word(0));
    if (kernel == kernels.end()) continue;  // of a device function
    const bool registers = attribute.id == kRegisterCount;
    ATTUNE_ASSIGN(value, count(attribute.word(1), registers ? "registers" : "bytes of stack"));
    (registers ? kernel->second.registers : kernel->second.stack_bytes) = value;
  }
  return done();
}

/// .nv.info.<kernel>
Result<void> read_own_attributes(const Section& section, CubinKernel& kernel) {
  ATTUNE_ASSIGN(attributes, read_attributes(section));
  for (const Attribute& attribute : attributes) {
    if (attribute.sized(kMaxThreads, 3)) {
      std::uint64_t threads = 1;
      for (std::size_t axis = 0; axis < 3; ++axis) {
        ATTUNE_ASSIGN(extent, count(attribute.word(axis), "threads"));
        ATTUNE_ASSIGN(product, count(threads * static_cast<std::uint64_t>(extent), "threads"));
        threads = static_cast<std::uint64_t>(product);
      }
      kernel.max_threads = static_cast<int>(threads);
    } else if (attribute.sized(kParameter, 3)) {
      const std::size_t number = attribute.word(1) & 0xffff;
      kernel.parameter_bytes.resize(std::max(kernel.parameter_bytes.size(), number + 1));
      kernel.parameter_bytes[number] = static_cast<int>(attribute.word(2) >> kParameterBytesShift);
    } else if (attribute.format == kByteFormat && attribute.id == kBarrierCount) {
      kernel.barriers = attribute.byte;
    }
  }
  return done();
}

int barriers_in_flags(const Elf64_Shdr& text) {
  return static_cast<int>(text.sh_flags >> kBarrierFlagShift & kBarrierFlagMask);
}

Result<int> static_shared_bytes(const Section& section, int sm) {
  ATTUNE_ASSIGN(bytes, count(section.header.sh_size, "bytes of shared memory"));
  return sm >= kFirstSmWithReserved ? std::max(bytes - kReservedSharedBytes, 0) : bytes;
}

std::optional<std::string_view> after(std::string_view text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return std::nullopt;
  return text.substr(prefix.size());
}

}  // namespace

Result<CubinInfo> read_cubin(std::span<const std::byte> bytes) {
  ATTUNE_ASSIGN(elf, read_header(bytes));
  ATTUNE_ASSIGN(sections, read_sections(bytes, elf));
  ATTUNE_ASSIGN(kernels, read_kernels(sections));
  CubinInfo info{.sm = sm_of(elf), .kernels = {}};

  std::map<std::string_view, CubinKernel*> by_name;
  for (auto& [symbol, kernel] : kernels) by_name[kernel.name] = &kernel;
  for (const Section& section : sections) {
    if (section.name == ".nv.info") ATTUNE_TRY(read_shared_attributes(section, kernels));
    if (const auto name = after(section.name, ".nv.info."); name && by_name.contains(*name)) {
      ATTUNE_TRY(read_own_attributes(section, *by_name[*name]));
    }
    if (const auto name = after(section.name, ".text."); name && by_name.contains(*name)) {
      CubinKernel& kernel = *by_name[*name];
      kernel.instructions = count_instructions(info.sm, section.data);
      if (!has_new_abi(elf)) kernel.barriers = barriers_in_flags(section.header);
    }
    if (const auto name = after(section.name, ".nv.shared."); name && by_name.contains(*name)) {
      ATTUNE_ASSIGN(shared, static_shared_bytes(section, info.sm));
      by_name[*name]->shared_bytes = shared;
    }
  }
  for (auto& [symbol, kernel] : kernels) info.kernels.push_back(std::move(kernel));
  std::ranges::sort(info.kernels, {}, &CubinKernel::name);
  return info;
}

}  // namespace attune::cache
