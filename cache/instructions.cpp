#include "cache/instructions.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace attune::cache {
namespace {

/// The oldest one with this encoding that nvdisasm was asked about.
constexpr int kFirstSm = 75;
constexpr std::size_t kInstructionBytes = 16;
/// The lowest bits; three more above them tell where operands come from.
constexpr std::uint16_t kOpcodeMask = 0x1ff;
constexpr std::uint16_t kNop = 0x118;

struct Opcode {
  std::uint16_t code;
  int InstructionCounts::*kind;
};
using Counts = InstructionCounts;
constexpr std::array kOpcodes{
    Opcode{0x020, &Counts::float32},  // FMUL
    Opcode{0x021, &Counts::float32},  // FADD
    Opcode{0x023, &Counts::float32},  // FFMA
    Opcode{0x03b, &Counts::shared},   // LDSM
    Opcode{0x03c, &Counts::tensor},   // HMMA
    Opcode{0x044, &Counts::shared},   // STSM
    Opcode{0x108, &Counts::special},  // MUFU
    Opcode{0x11d, &Counts::barrier},  // BAR
    Opcode{0x181, &Counts::global},   // LDG
    Opcode{0x183, &Counts::local},    // LDL
    Opcode{0x184, &Counts::shared},   // LDS
    Opcode{0x186, &Counts::global},   // STG
    Opcode{0x187, &Counts::local},    // STL
    Opcode{0x188, &Counts::shared},   // STS
    Opcode{0x18e, &Counts::global},   // RED
    Opcode{0x1a6, &Counts::global},   // REDG
    Opcode{0x1a7, &Counts::barrier},  // SYNCS
    Opcode{0x1a8, &Counts::global},   // ATOMG
    Opcode{0x1a9, &Counts::global},   // ATOMG
    Opcode{0x1ae, &Counts::global},   // LDGSTS
    Opcode{0x1b2, &Counts::barrier},  // SYNCS
    Opcode{0x1b4, &Counts::global},   // UTMALDG
    Opcode{0x1b5, &Counts::global},   // UTMASTG
    Opcode{0x1bb, &Counts::global},   // UBLKRED
    Opcode{0x1f0, &Counts::tensor},   // HGMMA
};

}  // namespace

std::optional<InstructionCounts> count_instructions(int sm, std::span<const std::byte> code) {
  if (sm < kFirstSm) return std::nullopt;
  InstructionCounts counts;
  for (; code.size() >= kInstructionBytes; code = code.subspan(kInstructionBytes)) {
    std::uint16_t opcode = 0;
    std::memcpy(&opcode, code.data(), sizeof opcode);
    opcode &= kOpcodeMask;
    if (opcode == kNop) continue;
    ++counts.all;
    const auto found = std::ranges::find(kOpcodes, opcode, &Opcode::code);
    if (found != kOpcodes.end()) ++(counts.*found->kind);
  }
  return counts;
}

}  // namespace attune::cache
