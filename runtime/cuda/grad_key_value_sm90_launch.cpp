#include "runtime/cuda/grad_key_value_sm90_launch.h"

#include "attune/backward.h"
#include "attune/cuda/shared.h"
#include "attune/hd.h"
#include "runtime/boxes.h"
#include "runtime/cuda/tensor_map.h"
#include "runtime/cuda/tile_counter.h"

#include <algorithm>

namespace attune::runtime {
namespace {

using kernel::BackwardParams;
using kernel::ForwardParams;
using kernel::GradKeyValueSm90Params;
using kernel::i64;
using kernel::KernelSpec;

constexpr i64 kSectionBytes = i64{32} << 20;  // of queries, output gradients and sums in the L2 cache

constexpr int kSharingTiles = 8;  // of a sequence, that read queries together: fewer, and memory is the limit

/// Do tiles of keys meet different numbers of queries?
bool uneven(const KernelSpec& spec) {
  return spec.window_left == kernel::Edge::bounded || spec.window_right == kernel::Edge::bounded ||
         spec.blocks == kernel::Blocks::varlen;
}

/// Tiles of a head that should run at a time where they take turns, so that they share queries. Neighbouring
/// tiles that are whole pages may belong to any sequences, so it takes as many more of them. A tile of
/// smaller pages has keys of many sequences, and more tiles would hold each other up.
i64 sharing_tiles(const KernelSpec& spec, const ForwardParams& p) {
  const bool whole_pages = spec.keys == kernel::Keys::paged && p.sequences.page_size.divisor >= spec.block_n;
  return i64{kSharingTiles} * (whole_pages ? p.sequences.count : 1);
}

/// How many neighbouring (batch, head) pairs are a section: as many as have queries, with what goes along,
/// that fit the L2 cache together. But enough that every block or cluster gets a tile: with fewer, the long
/// tiles of the last section would be all that is left to do at the end. And where tiles of different lengths
/// take turns, enough that those that run at a time belong to many heads: in one head each waits for the one
/// before.
int section_of(const CudaDevice& device, const KernelSpec& spec, const GradKeyValueSm90Params& p) {
  const i64 pair_bytes = i64{p.backward.forward.len_q} * p.sharing * spec.head_dim * (2 + 2 + 4);
  const int tiles = device.multiprocessors / kernel::cluster_blocks(spec);  // at a time
  const bool takes_turns = spec.query_gradient == kernel::QueryGradient::ordered && uneven(spec);
  const i64 sharing = sharing_tiles(spec, p.backward.forward);
  const auto serves = [&](int section) {
    return section / 2 * p.key_blocks < tiles || section * pair_bytes <= kSectionBytes ||
           (takes_turns && section * sharing <= device.multiprocessors);
  };
  int section = 1;
  while (section * 2 <= p.pairs && serves(section * 2)) section *= 2;
  return section;
}

}  // namespace

Result<void> fill_sm90_params(const CudaDevice& device, const KernelSpec& spec,
                              const BackwardParams& backward, CUstream stream, GradKeyValueSm90Params& p) {
  const Driver& driver = *device.driver;
  const ForwardParams& forward = backward.forward;
  ATTUNE_TRY(add_tiles(driver, spec, backward, p));
  p.backward = backward;
  p.heads = backward.key_groups * backward.key_heads;
  p.sharing = kernel::sharing_heads(backward);
  p.heads_per_key_head = static_cast<int>(p.heads / key_axes(forward, forward.key_strides).heads);
  if (spec.bias != kernel::Bias::none) {
    const int row_bytes = kernel::GradKeyValueSm90Shared(spec).bias_row_bytes;
    ATTUNE_TRY(add_bias(driver, spec, forward, p.heads * p.sharing, row_bytes, p));
  }
  if (backward.grad_bias != nullptr) {
    ATTUNE_TRY(encode_bias(driver, spec.bias, backward.grad_bias, forward.len_k, bias_gradient_axes(backward),
                           kernel::Sm90Shared::kPanelRowBytes, spec.block_m, p.grad_bias));
  }
  p.key_blocks = kernel::ceil_div(forward.len_k, kernel::cluster_keys(spec));
  p.pairs = forward.batch * p.heads;
  p.tiles = p.key_blocks * p.pairs;
  p.blocks = std::min(device.multiprocessors / kernel::cluster_blocks(spec), p.tiles);
  p.section = section_of(device, spec, p);
  if (spec.query_gradient == kernel::QueryGradient::ordered) {
    p.counter = backward.turns;
  } else if (uneven(spec)) {
    p.counter = tile_counter(driver, stream);
  }
  return done();
}

unsigned sm90_blocks(const CudaDevice&, const GradKeyValueSm90Params& params) {
  return static_cast<unsigned>(params.blocks);
}

}  // namespace attune::runtime
