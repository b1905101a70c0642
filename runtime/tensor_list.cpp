// BlockDiagonalMask's ways from a list of tensors to packed ones and back.
#include "attune/attn_bias.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstring>

namespace attune {
namespace {

using runtime::refuse;

void check_alike(const char* name, std::span<const TensorView> tensors) {
  if (tensors.empty()) refuse("{}: an empty list; give one tensor at least", name);
  const TensorView& first = tensors.front();
  for (std::size_t n = 0; n < tensors.size(); ++n) {
    const TensorView& t = tensors[n];
    if (t.rank < 2 || t.rank > kMaxRank) {
      refuse("{}[{}]: rank {}, expected [B, M, ...] of 2 to {} axes", name, n, t.rank, kMaxRank);
    }
    bool alike = t.rank == first.rank && t.dtype == first.dtype && t.device == first.device;
    for (int axis = 2; alike && axis < t.rank; ++axis) alike = t.shape[axis] == first.shape[axis];
    if (!alike) {
      refuse(
          "{}[{}]: {} {} on {}, but {}[0] is {} {} on {}; all should have the same dtype, device and extents "
          "but for "
          "the first two",
          name, n, runtime::text_of(t.dtype), runtime::shape_text(t), runtime::text_of(t.device), name,
          runtime::text_of(first.dtype), runtime::shape_text(first), runtime::text_of(first.device));
    }
  }
}

/// Copies runs of neighbouring elements, in row-major order, to where `to` points.
class Packer {
 public:
  Packer(const MutableTensorView& to, void* stream)
      : to_(static_cast<std::byte*>(to.data)), device_(to.device), stream_(stream) {}

  void append(const TensorView& from) {
    int outer = from.rank;  // axes from here on are one run
    std::int64_t run = 1;
    while (outer > 0 && (from.shape[outer - 1] == 1 || from.strides[outer - 1] == run)) {
      run *= from.shape[--outer];
    }
    append_runs(from, static_cast<const std::byte*>(from.data), 0, outer, run * item_bytes(from.dtype));
  }

 private:
  void append_runs(const TensorView& from, const std::byte* data, int axis, int outer,
                   std::int64_t run_bytes) {
    if (run_bytes == 0) return;
    if (axis == outer) return copy(data, static_cast<std::size_t>(run_bytes));
    const std::int64_t step = from.strides[axis] * item_bytes(from.dtype);
    for (std::int64_t i = 0; i < from.shape[axis]; ++i) {
      append_runs(from, data + i * step, axis + 1, outer, run_bytes);
    }
  }

  void copy(const std::byte* from, std::size_t bytes) {
    if (device_.type == DeviceType::cpu) {
      std::memcpy(to_, from, bytes);
    } else {
      runtime::take(runtime::cuda_copy_on_device(device_.index, to_, from, bytes, stream_));
    }
    to_ += bytes;
  }

  std::byte* to_;
  Device device_;
  void* stream_;
};

/// [1, sum B_i * M_i, ...]
Tensor pack(const char* name, std::span<const TensorView> tensors, void* stream) {
  check_alike(name, tensors);
  const TensorView& first = tensors.front();
  std::int64_t rows = 0;
  for (const TensorView& t : tensors) rows += t.shape[0] * t.shape[1];
  std::vector<std::int64_t> shape{1, rows};
  shape.insert(shape.end(), first.shape.begin() + 2, first.shape.begin() + first.rank);
  Tensor packed(first.dtype, first.device, shape, stream);
  Packer packer(packed.view(), stream);
  for (const TensorView& t : tensors) packer.append(t);
  return packed;
}

/// One length for each batch row of each tensor.
SeqLens lens_of(std::span<const TensorView> tensors) {
  SeqLens lens;
  for (const TensorView& t : tensors)
    lens.insert(lens.end(), static_cast<std::size_t>(t.shape[0]), t.shape[1]);
  return lens;
}

std::vector<std::int64_t> batch_sizes_of(std::span<const TensorView> tensors) {
  std::vector<std::int64_t> sizes;
  for (const TensorView& t : tensors) sizes.push_back(t.shape[0]);
  return sizes;
}

void check_pairs(const char* name, std::span<const TensorView> tensors, std::span<const TensorView> queries,
                 std::span<const TensorView> keys) {
  if (tensors.size() != queries.size()) {
    refuse("from_tensor_lists_qkv: {} {} but {} queries; expected one for each", tensors.size(), name,
           queries.size());
  }
  for (std::size_t n = 0; n < tensors.size(); ++n) {
    if (tensors[n].shape[0] != queries[n].shape[0]) {
      refuse("from_tensor_lists_qkv: {}[{}] has batch {}, but queries[{}] has {}", name, n,
             tensors[n].shape[0], n, queries[n].shape[0]);
    }
    if (tensors[n].shape[1] != keys[n].shape[1]) {
      refuse("from_tensor_lists_qkv: {}[{}] has {} rows, but keys[{}] has {}", name, n, tensors[n].shape[1],
             n, keys[n].shape[1]);
    }
  }
}

/// Views of the rows between the starts; as many blocks in each as `batch_sizes` says, or one.
std::vector<TensorView> split_rows(const char* what, const TensorView& tensor, const Int32Table& starts,
                                   const std::vector<std::int64_t>& batch_sizes) {
  if (!starts.on_host()) {
    refuse("{}: the lengths are on a device alone; views of the host need them here", what);
  }
  const std::vector<std::int32_t>& rows = starts.host();
  if (tensor.rank < 2 || tensor.shape[0] != 1 || tensor.shape[1] != rows.back()) {
    refuse("{}: the tensor has shape {}, expected [1, {}, ...]", what, runtime::shape_text(tensor),
           rows.back());
  }
  const std::vector<std::int64_t> batches =
      batch_sizes.empty() ? std::vector<std::int64_t>(rows.size() - 1, 1) : batch_sizes;
  std::vector<TensorView> parts;
  std::size_t block = 0;
  for (const std::int64_t batch : batches) {
    TensorView part = tensor;
    part.data = static_cast<const std::byte*>(tensor.data) +
                rows[block] * tensor.strides[1] * item_bytes(tensor.dtype);
    part.shape[0] = batch;
    part.shape[1] = batch > 0 ? rows[block + 1] - rows[block] : 0;
    part.strides[0] = part.shape[1] * tensor.strides[1];
    parts.push_back(part);
    block += static_cast<std::size_t>(batch);
  }
  return parts;
}

}  // namespace

std::pair<BlockDiagonalMask, Tensor> BlockDiagonalMask::from_tensor_list(std::span<const TensorView> tensors,
                                                                         void* stream) {
  Tensor packed = pack("tensors", tensors, stream);
  BlockDiagonalMask mask = from_seqlens(lens_of(tensors));
  mask.batch_sizes_ = batch_sizes_of(tensors);
  return {std::move(mask), std::move(packed)};
}

BlockDiagonalMask::Packed BlockDiagonalMask::from_tensor_lists_qkv(std::span<const TensorView> queries,
                                                                   std::span<const TensorView> keys,
                                                                   std::span<const TensorView> values,
                                                                   void* stream) {
  check_alike("queries", queries);
  check_alike("keys", keys);
  check_pairs("keys", keys, queries, keys);
  if (!values.empty()) {
    check_alike("values", values);
    check_pairs("values", values, queries, keys);
  }
  Packed packed{from_seqlens(lens_of(queries), lens_of(keys)), pack("queries", queries, stream),
                pack("keys", keys, stream), std::nullopt};
  if (!values.empty()) packed.value = pack("values", values, stream);
  packed.bias.batch_sizes_ = batch_sizes_of(queries);
  return packed;
}

std::vector<TensorView> BlockDiagonalMask::split(const TensorView& tensor) const {
  const Sequences& s = sequences();
  if (s.q_starts.on_host() && s.k_starts.on_host() && s.q_starts.host() != s.k_starts.host()) {
    refuse("split: queries and keys have different lengths; use split_queries or split_kv");
  }
  return split_rows("split", tensor, s.q_starts, batch_sizes_);
}

std::vector<TensorView> BlockDiagonalMask::split_queries(const TensorView& tensor) const {
  return split_rows("split_queries", tensor, sequences().q_starts, batch_sizes_);
}

std::vector<TensorView> BlockDiagonalMask::split_kv(const TensorView& tensor) const {
  return split_rows("split_kv", tensor, sequences().k_starts, batch_sizes_);
}

}  // namespace attune
