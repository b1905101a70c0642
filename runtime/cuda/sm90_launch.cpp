#include "runtime/cuda/sm90_launch.h"

#include "attune/blocks.h"
#include "attune/cuda/shared.h"
#include "attune/hd.h"
#include "attune/philox.h"
#include "runtime/boxes.h"
#include "runtime/cuda/tensor_map.h"
#include "runtime/cuda/tile_counter.h"

#include <algorithm>
#include <numeric>

namespace attune::runtime {
namespace {

using kernel::ForwardParams;
using kernel::ForwardSm90Params;
using kernel::i64;
using kernel::KernelSpec;
using kernel::Sm90Shared;

constexpr i64 kSectionBytes = i64{32} << 20;  // of keys and values that stay in the L2 cache

/// A box of keys lies within a page, and boxes make up a tile.
int key_box_rows(const KernelSpec& spec, const ForwardParams& p) {
  return spec.keys == kernel::Keys::paged ? std::gcd(spec.block_n, p.sequences.page_run) : spec.block_n;
}

/// How many neighbouring (batch, head) pairs have keys and values that fit the L2 cache together.
int section_of(const KernelSpec& spec, const ForwardSm90Params& p) {
  const i64 pair_bytes = i64{p.forward.len_k} * (spec.head_dim + spec.head_dim_v) * 2 / p.heads_per_key_head;
  int section = 1;
  while (section * 2 <= p.pairs && section * 2 * pair_bytes <= kSectionBytes) section *= 2;
  return section;
}

}  // namespace

Result<void> fill_sm90_params(const CudaDevice& device, const KernelSpec& spec, const ForwardParams& forward,
                              CUstream stream, ForwardSm90Params& p) {
  const Driver& driver = *device.driver;
  const BoxAxes query = query_axes(forward, forward.query_strides);
  const BoxAxes key = key_axes(forward, forward.key_strides);
  const BoxAxes value = key_axes(forward, forward.value_strides);
  ATTUNE_TRY(encode_panels(driver, spec.dtype, forward.query, spec.head_dim, query, Sm90Shared::kGroupRows,
                           p.query));
  p.key_box_rows = key_box_rows(spec, forward);
  ATTUNE_TRY(encode_panels(driver, spec.dtype, forward.key, spec.head_dim, key, p.key_box_rows, p.key));
  ATTUNE_TRY(
      encode_panels(driver, spec.dtype, forward.value, spec.head_dim_v, value, p.key_box_rows, p.value));
  if (spec.output_dtype == spec.dtype) {
    ATTUNE_TRY(encode_panels(driver, spec.dtype, forward.output, spec.head_dim_v,
                             query_axes(forward, forward.output_strides), Sm90Shared::kGroupRows, p.output));
  }
  p.forward = forward;
  if (spec.dropout == kernel::Dropout::on) p.dropout = kernel::ready(forward.dropout);
  p.heads = forward.groups * forward.heads;
  p.heads_per_key_head = static_cast<int>(p.heads / key.heads);
  if (spec.bias != kernel::Bias::none) {
    ATTUNE_TRY(add_bias(driver, spec, forward, p.heads, Sm90Shared(spec).bias_row_bytes, p));
  }
  p.row_blocks = static_cast<int>(kernel::tiles_of_head(spec, forward.len_q, forward.sequences.count));
  p.pairs = forward.batch * p.heads;
  p.tiles = p.row_blocks * p.pairs;
  p.section = section_of(spec, p);
  const bool uneven = spec.window_left == kernel::Edge::bounded ||
                      spec.window_right == kernel::Edge::bounded || spec.blocks == kernel::Blocks::varlen;
  if (uneven) p.counter = tile_counter(driver, stream);
  return done();
}

unsigned sm90_blocks(const CudaDevice& device, const ForwardSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.tiles));
}

}  // namespace attune::runtime
