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

/// Which of a call's 8 keys are kept for a query: a bit for each, in their order.
ATTUNE_DEVICE u32 kept_keys(const DropoutParams& p, i32 block, i32 head, u32 query, i32 call) {
  const Philox<DropoutWord> bits = dropout_bits(p, block, head, DropoutWord(query), call);
  const u32 last_dropped = (p.threshold << 16) - 1;  // of 16 bits in the high half of a word; ~0 if all are
  u32 kept = 0;
#pragma unroll
  for (i32 w = 0; w < 4; ++w) {
    kept |= bits.word[w].bits << 16 > last_dropped ? 1u << w * 2 : 0u;
    kept |= bits.word[w].bits > last_dropped ? 2u << w * 2 : 0u;
  }
  return kept;
}

/// kept() of philox.h for the pair of a word at once, by arithmetic on halves of 16 bits.
class DropTest {
 public:
  ATTUNE_DEVICE explicit DropTest(const DropoutParams& p) : bounds_(drop_bounds(p)) {}
  ATTUNE_DEVICE explicit DropTest(const ReadyDropout& p) : bounds_(p.bounds) {}

  /// What drop() takes: below() of a word, or of its complement where complements() says so.
  ATTUNE_DEVICE u32 dropped(u32 word) const { return below(word ^ bounds_.flip); }
  ATTUNE_DEVICE bool complements() const { return bounds_.flip != 0; }
  ATTUNE_DEVICE u32 below(u32 word) const {
    const u32 least = ptx::min_u16x2(word, bounds_.bound);
    return ptx::max_s16x2(ptx::add_s16x2(least, bounds_.negative_bound), 0xffffffffu);
  }
  /// Of a pair of 16-bit numbers, those that are dropped become 0.
  ATTUNE_DEVICE void drop(u32& pair, u32 dropped) const { pair &= ~(dropped ^ bounds_.flip); }

 private:
  DropBounds bounds_;
};

}  // namespace attune::kernel
