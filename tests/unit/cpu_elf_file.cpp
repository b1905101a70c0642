#include "tests/unit/cpu_elf_file.h"

#include <elf.h>

#include <cstring>
#include <stdexcept>

namespace attune::test {
namespace {

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  T at(std::size_t offset) const {
    if (offset > bytes_.size() || bytes_.size() - offset < sizeof(T))
      throw std::runtime_error("ELF: truncated");
    T value;
    std::memcpy(&value, bytes_.data() + offset, sizeof value);
    return value;
  }
  std::string text(std::size_t offset) const {
    std::string text;
    while (const char c = at<char>(offset++)) text += c;
    return text;
  }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace

ElfFile ElfFile::parse(std::span<const std::byte> bytes) {
  const Reader file(bytes);
  const auto header = file.at<Elf64_Ehdr>(0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_type != ET_DYN) {
    throw std::runtime_error("ELF: no shared object");
  }
  const auto section = [&](std::size_t index) {
    return file.at<Elf64_Shdr>(header.e_shoff + index * sizeof(Elf64_Shdr));
  };
  ElfFile result;
  for (std::size_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr table = section(i);
    if (table.sh_type != SHT_DYNSYM && table.sh_type != SHT_DYNAMIC) continue;
    const std::size_t names = section(table.sh_link).sh_offset;
    for (std::size_t at = table.sh_offset; at < table.sh_offset + table.sh_size; at += table.sh_entsize) {
      if (table.sh_type == SHT_DYNAMIC) {
        const auto entry = file.at<Elf64_Dyn>(at);
        if (entry.d_tag == DT_NEEDED) result.needed.push_back(file.text(names + entry.d_un.d_val));
        continue;
      }
      const auto symbol = file.at<Elf64_Sym>(at);
      if (symbol.st_name == 0) continue;
      const std::string name = file.text(names + symbol.st_name);
      if (symbol.st_shndx != SHN_UNDEF) {
        result.defined.push_back(name);
      } else if (ELF64_ST_BIND(symbol.st_info) == STB_GLOBAL) {
        result.undefined.push_back(name);
      }
    }
  }
  return result;
}

}  // namespace attune::test
