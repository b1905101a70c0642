// Dropout in a kernel that has few issue slots to spare. Philox (philox.h) keeps a GPU's integer units busy:
// products take both halves from one instruction, and pairs are told apart two at a time.
#pragma once

#include "attune/cuda/ptx_sm90.cuh"
#include "attune/hd.h"
#include "attune/num.h"
#include "attune/philox.h"

namespace attune::kernel {

/// The word that Philox works on. Both halves of a product are of the same instruction: the compiler sees two
/// equal ones, and keeps one.
struct DropoutWord {
  u32 bits;

  ATTUNE_DEVICE explicit DropoutWord(u32 x) : bits(x) {}
  friend ATTUNE_DEVICE DropoutWord operator^(DropoutWord a, DropoutWord b) {
    return DropoutWord(a.bits ^ b.bits);
  }
  friend ATTUNE_DEVICE DropoutWord operator*(DropoutWord a, DropoutWord b) {
    return DropoutWord(static_cast<u32>(ptx::mul_wide_u32(a.bits, b.bits)));
  }
};

template <>
struct MultiplyHigh<DropoutWord> {
  static ATTUNE_DEVICE DropoutWord of(DropoutWord a, u32 b) {
    return DropoutWord(static_cast<u32>(ptx::mul_wide_u32(a.bits, b) >> 32));
  }
};

/// kept() of philox.h for the pair of a word at once, by arithmetic on halves of 16 bits.
class DropTest {
 public:
  /// Below a threshold up to 2^15 a half's distance from it fits 16 bits with a sign. Others are told from
  /// the complement: x >= threshold is ~x < 2^16 - threshold.
  ATTUNE_DEVICE explicit DropTest(const DropoutParams& p)
      : flip_(0u - ((p.threshold + 0x7fff) >> 16)),  // selected, it would select in below(), too
        bound_((flip_ == 0 ? p.threshold : 0x10000u - p.threshold) * 0x10001u),
        negative_((flip_ == 0 ? 0x10000u - p.threshold : p.threshold) % 0x10000u * 0x10001u) {}
  ATTUNE_DEVICE explicit DropTest(const ReadyDropout& p)
      : flip_(p.flip), bound_(p.bound), negative_(p.negative_bound) {}

  /// What drop() takes: below() of a word, or of its complement where complements() says so.
  ATTUNE_DEVICE u32 dropped(u32 word) const { return below(word ^ flip_); }
  ATTUNE_DEVICE bool complements() const { return flip_ != 0; }
  ATTUNE_DEVICE u32 below(u32 word) const {
    const u32 least = ptx::min_u16x2(word, bound_);
    return ptx::max_s16x2(ptx::add_s16x2(least, negative_), 0xffffffffu);
  }
  /// Of a pair of 16-bit numbers, those that are dropped become 0.
  ATTUNE_DEVICE void drop(u32& pair, u32 dropped) const { pair &= ~(dropped ^ flip_); }

 private:
  u32 flip_, bound_, negative_;
};

}  // namespace attune::kernel
