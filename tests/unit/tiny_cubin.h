// Builds the ELF of a cubin with the parts that read_cubin() reads, so that tests can say anything in one,
// lies included.
#pragma once

#include <elf.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace attune::test {

class TinyCubin {
 public:
  struct Kernel {
    std::string name;
    std::uint32_t registers = 0;
    std::uint32_t stack = 0;
    std::uint8_t barriers = 0;       // as an attribute
    std::uint8_t flag_barriers = 0;  // in .text's flags, as before CUDA 13
    std::uint32_t shared = 0;        // as the section says: with the reserved bytes from sm_90 on
    std::uint32_t threads[3] = {0, 0, 0};
    std::vector<std::uint32_t> parameter_bytes = {};
    std::uint64_t code = 0;
    std::vector<std::uint16_t> opcodes = {};  // of .text: the lowest bits of each instruction
    bool entry = true;                        // false: a device function
  };

  static std::vector<std::byte> build(std::uint32_t flags, std::uint8_t abi_version,
                                      const std::vector<Kernel>& kernels) {
    TinyCubin cubin;
    for (const Kernel& kernel : kernels) cubin.add(kernel);
    return cubin.link(flags, abi_version);
  }

 private:
  struct Section {
    Elf64_Shdr header{};
    std::string data;
  };

  template <typename T>
  static std::string raw(const T& value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  static std::string sized(std::uint8_t attribute, const std::vector<std::uint32_t>& words) {
    std::string record{'\x04', static_cast<char>(attribute)};
    record += raw(static_cast<std::uint16_t>(4 * words.size()));
    for (const std::uint32_t word : words) record += raw(word);
    return record;
  }

  Section& section(const std::string& name, std::uint32_t type, std::string data) {
    Section added{.header = {}, .data = std::move(data)};
    added.header.sh_name = static_cast<std::uint32_t>(section_names_.size());
    added.header.sh_type = type;
    added.header.sh_size = added.data.size();
    section_names_ += name + '\0';
    return sections_.emplace_back(std::move(added));
  }

  void add(const Kernel& kernel) {
    const auto index = static_cast<std::uint32_t>(symbols_.size());
    Elf64_Sym symbol{};
    symbol.st_name = static_cast<std::uint32_t>(symbol_names_.size());
    symbol.st_info = ELF64_ST_INFO(STB_GLOBAL, STT_FUNC);
    symbol.st_other = kernel.entry ? 0x10 : 0;
    symbol.st_size = kernel.code;
    symbols_.push_back(symbol);
    symbol_names_ += kernel.name + '\0';

    info_ += sized(0x2f, {index, kernel.registers}) + sized(0x11, {index, kernel.stack});
    std::string own = std::string("\x03\x36\0\0", 4);  // a record that nobody reads
    if (kernel.threads[0] != 0) own += sized(0x05, {kernel.threads[0], kernel.threads[1], kernel.threads[2]});
    for (auto number = static_cast<std::uint32_t>(kernel.parameter_bytes.size()); number-- > 0;) {
      own += sized(0x17, {0, number, kernel.parameter_bytes[number] << 18 | 0x1f000});
    }
    if (kernel.barriers != 0) own += std::string{'\x02', '\x4c', static_cast<char>(kernel.barriers), '\0'};
    section(".nv.info." + kernel.name, SHT_LOPROC, own);
    std::string text;
    for (const std::uint16_t opcode : kernel.opcodes) text += raw(opcode) + std::string(14, '\xff');
    section(".text." + kernel.name, SHT_PROGBITS, text).header.sh_flags = std::uint64_t{kernel.flag_barriers}
                                                                          << 20;
    if (kernel.shared != 0)
      section(".nv.shared." + kernel.name, SHT_NOBITS, "").header.sh_size = kernel.shared;
  }

  std::vector<std::byte> link(std::uint32_t flags, std::uint8_t abi_version) {
    section(".nv.info", SHT_LOPROC, info_);
    std::string symbols;
    for (const Elf64_Sym& symbol : symbols_) symbols += raw(symbol);
    const auto names_index = static_cast<std::uint32_t>(sections_.size());
    section(".strtab", SHT_STRTAB, symbol_names_);
    section(".symtab", SHT_SYMTAB, symbols).header.sh_link = names_index;
    Section& names = section(".shstrtab", SHT_STRTAB, "");
    names.data = section_names_;
    names.header.sh_size = section_names_.size();

    std::string body;
    std::string table;
    for (Section& one : sections_) {
      one.header.sh_offset = sizeof(Elf64_Ehdr) + body.size();
      body += one.data;
      table += raw(one.header);
    }
    Elf64_Ehdr elf{};
    std::memcpy(elf.e_ident, ELFMAG, SELFMAG);
    elf.e_ident[EI_CLASS] = ELFCLASS64;
    elf.e_ident[EI_DATA] = ELFDATA2LSB;
    elf.e_ident[EI_ABIVERSION] = abi_version;
    elf.e_machine = EM_CUDA;
    elf.e_flags = flags;
    elf.e_shoff = sizeof(Elf64_Ehdr) + body.size();
    elf.e_shentsize = sizeof(Elf64_Shdr);
    elf.e_shnum = static_cast<std::uint16_t>(sections_.size());
    elf.e_shstrndx = static_cast<std::uint16_t>(sections_.size() - 1);
    const std::string file = raw(elf) + body + table;
    const auto* begin = reinterpret_cast<const std::byte*>(file.data());
    return {begin, begin + file.size()};
  }

  std::vector<Section> sections_ = std::vector<Section>(1);  // section 0 is null
  std::vector<Elf64_Sym> symbols_ = std::vector<Elf64_Sym>(1);
  std::string section_names_ = std::string(1, '\0');
  std::string symbol_names_ = std::string(1, '\0');
  std::string info_;
};

}  // namespace attune::test
