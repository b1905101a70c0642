// Attention biases: which keys a query sees, and what is added to its scores. Every class of the
// documentation stands here under its own name and turns into the one AttentionBias that the functions take.
#pragma once

#include "attune/error.h"
#include "attune/tensor.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace attune {

// ---- What every bias reduces to ----

/// Query i of a block sees key j of it iff i + s - left <= j <= i + s + right, where s is 0 (top_left) or the
/// block's len_k - len_q (bottom_right). A negative reach is no bound.
struct Window {
  enum class Anchor { top_left, bottom_right };
  Anchor anchor = Anchor::top_left;
  std::int64_t left = -1;
  std::int64_t right = -1;
};

/// int32 numbers that belong to a bias: a host list, a tensor on the device where attention will run, or
/// both. A host list is copied to a device at its first use there, once (refused while that stream is
/// captured); a device tensor is used as it is, is never read back, and must outlive the bias. Copies share
/// one table, and with it what was copied to devices, which work that has been enqueued may still read after
/// the last of them is gone. A captured graph may not: keep its biases as long as the graph.
class ATTUNE_EXPORT Int32Table {
 public:
  Int32Table(std::vector<std::int32_t> host);  // NOLINT: implicit, a list is a table
  /// A contiguous i32 tensor, on any device. One on the CPU is copied and becomes a host list.
  Int32Table(const TensorView& tensor);  // NOLINT: implicit
  /// A host list whose copy on a device is already there.
  Int32Table(std::vector<std::int32_t> host, const TensorView& tensor);

  std::int64_t size() const;
  /// Are the numbers known to the host? Where they are not, nothing can be checked.
  bool on_host() const;
  const std::vector<std::int32_t>& host() const;
  /// The numbers in the memory of `device`. Throws Error: environment when they cannot be copied there,
  /// invalid_argument when they are on another device and nowhere else.
  const std::int32_t* on(Device device, void* stream = nullptr) const;
  /// The numbers, copied back if they have to be; waits for the device. For materialize.
  std::vector<std::int32_t> read() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Sequences packed on the sequence axis: block b has the query rows [q_starts[b], q_starts[b + 1]) and the
/// keys that start at k_starts[b].
struct Sequences {
  std::int64_t count = 0;
  Int32Table q_starts;                     // [count + 1], the last is the number of query rows
  Int32Table k_starts;                     // [count + 1], or [count] where k_lens stands
  std::optional<Int32Table> k_lens;        // [count]; absent: k_starts[b + 1] - k_starts[b]
  std::optional<Int32Table> block_tables;  // [count, table_width]: paged; k_starts are then logical
  std::int64_t table_width = 0;
  std::int64_t page_size = 0;
  std::int64_t page_run = 0;   // paged: divides page_size and every k_start; 0: as far as the host knows them
  std::int64_t key_rows = -1;  // rows that key and value must have exactly; negative: not known to the host
};

/// A bias in the terms of the kernels. Copies are cheap.
struct ATTUNE_EXPORT AttentionBias {
  std::string name = "None";  // of the class that made it
  Window window;
  /// Added to the scores ([B or 1, H or 1, Mq or 1, Mkv], or with G; any strides, any of the three floating
  /// types), or boolean: true is visible. With sequences: [1, H or 1, all query rows or 1, all key rows].
  std::optional<TensorView> tensor;
  std::shared_ptr<const Sequences> sequences;  // null: one block per batch entry

  AttentionBias() = default;
  /// A dense bias tensor.
  AttentionBias(const TensorView& bias) : name("Tensor"), tensor(bias) {}  // NOLINT: implicit

  /// The same bias with a dense tensor on top: added where the mask lets the key through. Throws
  /// invalid_argument when there is one already.
  AttentionBias add_bias(const TensorView& bias) const;

  /// Dense, on the CPU: 0 where visible, -inf where not, plus the tensor. `shape` is [queries, keys], [B,
  /// queries, keys], [B, H, queries, keys] or [B, G, H, queries, keys]; keys are rows of the key tensor, also
  /// for paged biases. Slow; for debugging and tests. `dtype` is a floating one. Throws invalid_argument when
  /// the shape does not fit the bias.
  Tensor materialize(const std::vector<std::int64_t>& shape, DType dtype = DType::f32) const;
};

// ---- Masks of whole attention. Query i sees key j iff the predicate holds; s = len_k - len_q. ----

struct LowerTriangularMaskWithTensorBias;
struct LowerTriangularFromBottomRightLocalAttentionMask;

/// j <= i: causal, anchored at the first query and the first key.
struct ATTUNE_EXPORT LowerTriangularMask {
  LowerTriangularMaskWithTensorBias add_bias(const TensorView& bias) const;
  operator AttentionBias() const;  // NOLINT: implicit
};

/// j <= i, and a dense tensor is added.
struct ATTUNE_EXPORT LowerTriangularMaskWithTensorBias {
  TensorView bias;
  operator AttentionBias() const;  // NOLINT: implicit
};

/// j <= i + s: causal, anchored at the last query and the last key.
struct ATTUNE_EXPORT LowerTriangularFromBottomRightMask {
  LowerTriangularFromBottomRightLocalAttentionMask make_local_attention(std::int64_t window_size) const;
  operator AttentionBias() const;  // NOLINT: implicit
};

/// i + s - window_size < j <= i + s. window_size >= 1 counts the diagonal itself; less throws
/// invalid_argument when the bias is used.
struct ATTUNE_EXPORT LowerTriangularFromBottomRightLocalAttentionMask {
  std::int64_t window_size = 1;
  operator AttentionBias() const;  // NOLINT: implicit
};

/// i + s - window_left <= j <= i + s + window_right; both reaches >= 0.
struct ATTUNE_EXPORT LocalAttentionFromBottomRightMask {
  std::int64_t window_left = 0;
  std::int64_t window_right = 0;
  operator AttentionBias() const;  // NOLINT: implicit
};

// ---- Masks of packed sequences: query, key and value have batch 1 and all sequences on the sequence axis
// ----
//
// Factories take lengths from the host. Where lengths live on a device, from_seqstarts and its siblings take
// int32 tables (cumulative starts, as every varlen interface has them; lengths of keys as they are): nothing
// is read back and nothing waits, so checks of their contents fall away; wrong ones never write outside the
// output.

using SeqLens = std::vector<std::int64_t>;

/// What the block-diagonal classes share.
class ATTUNE_EXPORT SequenceMask {
 public:
  operator AttentionBias() const { return bias_; }  // NOLINT: implicit
  const AttentionBias& bias() const { return bias_; }
  const Sequences& sequences() const { return *bias_.sequences; }

 protected:
  explicit SequenceMask(AttentionBias bias) : bias_(std::move(bias)) {}
  AttentionBias bias_;
};

class BlockDiagonalCausalMask;
class BlockDiagonalCausalFromBottomRightMask;
class BlockDiagonalCausalLocalAttentionMask;
class BlockDiagonalCausalLocalAttentionFromBottomRightMask;

/// Queries of block b see the keys of block b.
class ATTUNE_EXPORT BlockDiagonalMask : public SequenceMask {
 public:
  /// kv_seqlen empty: as q_seqlen. Throws invalid_argument for unequal counts or negative lengths.
  static BlockDiagonalMask from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqlen = {});
  /// Cumulative starts, [count + 1] each, on a device.
  static BlockDiagonalMask from_seqstarts(Int32Table q_starts, Int32Table k_starts);
  /// Concatenates [B_i, M_i, ...] tensors to [1, sum B_i * M_i, ...]; each batch row becomes a block.
  static std::pair<BlockDiagonalMask, Tensor> from_tensor_list(std::span<const TensorView> tensors,
                                                               void* stream = nullptr);
  struct Packed;
  static Packed from_tensor_lists_qkv(std::span<const TensorView> queries, std::span<const TensorView> keys,
                                      std::span<const TensorView> values = {}, void* stream = nullptr);
  /// The inverse: views [B_i, M_i, ...] of a [1, total, ...] tensor. split demands equal query and key
  /// lengths.
  std::vector<TensorView> split(const TensorView& tensor) const;
  std::vector<TensorView> split_queries(const TensorView& tensor) const;
  std::vector<TensorView> split_kv(const TensorView& tensor) const;

  BlockDiagonalCausalMask make_causal() const;
  BlockDiagonalCausalFromBottomRightMask make_causal_from_bottomright() const;
  BlockDiagonalCausalLocalAttentionMask make_local_attention(std::int64_t window_size) const;
  BlockDiagonalCausalLocalAttentionFromBottomRightMask make_local_attention_from_bottomright(
      std::int64_t window_size) const;

 protected:
  BlockDiagonalMask(AttentionBias bias, std::vector<std::int64_t> batch_sizes)
      : SequenceMask(std::move(bias)), batch_sizes_(std::move(batch_sizes)) {}
  std::vector<std::int64_t> batch_sizes_;  // of the tensors that were concatenated; empty otherwise
};

struct BlockDiagonalMask::Packed {
  BlockDiagonalMask bias;
  Tensor query, key;
  std::optional<Tensor> value;
};

/// Same block and j <= i. Lists of tensors: BlockDiagonalMask's from_tensor_list, then make_causal.
class ATTUNE_EXPORT BlockDiagonalCausalMask : public BlockDiagonalMask {
 public:
  static BlockDiagonalCausalMask from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqlen = {});
  static BlockDiagonalCausalMask from_seqstarts(Int32Table q_starts, Int32Table k_starts);
  static void from_tensor_list() = delete;
  static void from_tensor_lists_qkv() = delete;

 protected:
  friend class BlockDiagonalMask;
  using BlockDiagonalMask::BlockDiagonalMask;
};

/// Same block and j <= i + s; every block has as many keys as queries or more. Lists of tensors:
/// BlockDiagonalMask's from_tensor_list, then make_causal_from_bottomright.
class ATTUNE_EXPORT BlockDiagonalCausalFromBottomRightMask : public BlockDiagonalMask {
 public:
  static BlockDiagonalCausalFromBottomRightMask from_seqlens(const SeqLens& q_seqlen,
                                                             const SeqLens& kv_seqlen = {});
  static BlockDiagonalCausalFromBottomRightMask from_seqstarts(Int32Table q_starts, Int32Table k_starts);
  static void from_tensor_list() = delete;
  static void from_tensor_lists_qkv() = delete;

 protected:
  friend class BlockDiagonalMask;
  using BlockDiagonalMask::BlockDiagonalMask;
};

/// Same block and i - window_size < j <= i; no block is so short of keys that a query sees none. Made by
/// BlockDiagonalMask::make_local_attention.
class ATTUNE_EXPORT BlockDiagonalCausalLocalAttentionMask : public BlockDiagonalCausalMask {
 public:
  static void from_seqlens() = delete;
  static void from_seqstarts() = delete;

 protected:
  friend class BlockDiagonalMask;
  using BlockDiagonalCausalMask::BlockDiagonalCausalMask;
};

/// Same block and i + s - window_size < j <= i + s; every block has as many keys as queries or more. Made by
/// BlockDiagonalMask::make_local_attention_from_bottomright.
class ATTUNE_EXPORT BlockDiagonalCausalLocalAttentionFromBottomRightMask
    : public BlockDiagonalCausalFromBottomRightMask {
 public:
  static void from_seqlens() = delete;
  static void from_seqstarts() = delete;

 protected:
  friend class BlockDiagonalMask;
  using BlockDiagonalCausalFromBottomRightMask::BlockDiagonalCausalFromBottomRightMask;
};

// ---- Keys in padded blocks, in blocks with gaps, and in pages ----

/// The pages of each sequence's logical keys: page t / page_size of block b is table[b, t / page_size].
struct BlockTables {
  Int32Table table;  // [count, width]
  std::int64_t width = 0;
  std::int64_t page_size = 0;
};

class PagedBlockDiagonalPaddedKeysMask;
class PagedBlockDiagonalGappyKeysMask;

/// Block b's keys are the rows [b * kv_padding, b * kv_padding + kv_seqlen[b]).
class ATTUNE_EXPORT BlockDiagonalPaddedKeysMask : public SequenceMask {
 public:
  static BlockDiagonalPaddedKeysMask from_seqlens(const SeqLens& q_seqlen, std::int64_t kv_padding,
                                                  const SeqLens& kv_seqlen);
  static BlockDiagonalPaddedKeysMask from_seqstarts(Int32Table q_starts, std::int64_t kv_padding,
                                                    Int32Table kv_seqlen);
  /// The same lengths behind a block table; causality and windows stay.
  PagedBlockDiagonalPaddedKeysMask make_paged(const BlockTables& tables) const;

 protected:
  using SequenceMask::SequenceMask;
};

/// And j <= i + s.
class ATTUNE_EXPORT BlockDiagonalCausalWithOffsetPaddedKeysMask : public BlockDiagonalPaddedKeysMask {
 public:
  static BlockDiagonalCausalWithOffsetPaddedKeysMask from_seqlens(const SeqLens& q_seqlen,
                                                                  std::int64_t kv_padding,
                                                                  const SeqLens& kv_seqlen);
  static BlockDiagonalCausalWithOffsetPaddedKeysMask from_seqstarts(Int32Table q_starts,
                                                                    std::int64_t kv_padding,
                                                                    Int32Table kv_seqlen);

 protected:
  using BlockDiagonalPaddedKeysMask::BlockDiagonalPaddedKeysMask;
};

/// And i + s - window_left <= j <= i + s + window_right.
class ATTUNE_EXPORT BlockDiagonalLocalAttentionPaddedKeysMask : public BlockDiagonalPaddedKeysMask {
 public:
  static BlockDiagonalLocalAttentionPaddedKeysMask from_seqlens_local(const SeqLens& q_seqlen,
                                                                      std::int64_t kv_padding,
                                                                      const SeqLens& kv_seqlen,
                                                                      std::int64_t window_left,
                                                                      std::int64_t window_right);
  static BlockDiagonalLocalAttentionPaddedKeysMask from_seqstarts_local(Int32Table q_starts,
                                                                        std::int64_t kv_padding,
                                                                        Int32Table kv_seqlen,
                                                                        std::int64_t window_left,
                                                                        std::int64_t window_right);
  static void from_seqlens() = delete;
  static void from_seqstarts() = delete;

 protected:
  using BlockDiagonalPaddedKeysMask::BlockDiagonalPaddedKeysMask;
};

/// And i + s - window_size < j <= i + s.
class ATTUNE_EXPORT BlockDiagonalCausalLocalAttentionPaddedKeysMask : public BlockDiagonalPaddedKeysMask {
 public:
  static BlockDiagonalCausalLocalAttentionPaddedKeysMask from_seqlens_local(const SeqLens& q_seqlen,
                                                                            std::int64_t kv_padding,
                                                                            const SeqLens& kv_seqlen,
                                                                            std::int64_t window_size);
  static BlockDiagonalCausalLocalAttentionPaddedKeysMask from_seqstarts_local(Int32Table q_starts,
                                                                              std::int64_t kv_padding,
                                                                              Int32Table kv_seqlen,
                                                                              std::int64_t window_size);
  static void from_seqlens() = delete;
  static void from_seqstarts() = delete;

 protected:
  using BlockDiagonalPaddedKeysMask::BlockDiagonalPaddedKeysMask;
};

/// Block b's keys are the rows [kv_seqstarts[b], kv_seqstarts[b] + kv_seqlen[b]); blocks may overlap. The
/// last of the count + 1 starts is the number of key rows.
class ATTUNE_EXPORT BlockDiagonalGappyKeysMask : public SequenceMask {
 public:
  static BlockDiagonalGappyKeysMask from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                                                 const SeqLens& kv_seqlen);
  static BlockDiagonalGappyKeysMask from_seqstarts(Int32Table q_starts, Int32Table kv_seqstarts,
                                                   Int32Table kv_seqlen);
  /// Reads block b as living in the cell [b * notional_padding, (b + 1) * notional_padding) of logical keys.
  PagedBlockDiagonalGappyKeysMask make_paged(const BlockTables& tables, std::int64_t notional_padding) const;

 protected:
  using SequenceMask::SequenceMask;
};

/// And j <= i + s.
class ATTUNE_EXPORT BlockDiagonalCausalWithOffsetGappyKeysMask : public BlockDiagonalGappyKeysMask {
 public:
  static BlockDiagonalCausalWithOffsetGappyKeysMask from_seqlens(const SeqLens& q_seqlen,
                                                                 const SeqLens& kv_seqstarts,
                                                                 const SeqLens& kv_seqlen);
  static BlockDiagonalCausalWithOffsetGappyKeysMask from_seqstarts(Int32Table q_starts,
                                                                   Int32Table kv_seqstarts,
                                                                   Int32Table kv_seqlen);

 protected:
  using BlockDiagonalGappyKeysMask::BlockDiagonalGappyKeysMask;
};

/// Logical keys [0, kv_seqlen[b]) of each sequence, in pages.
class ATTUNE_EXPORT PagedBlockDiagonalPaddedKeysMask : public SequenceMask {
 public:
  static PagedBlockDiagonalPaddedKeysMask from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqlen,
                                                       const BlockTables& tables);
  static PagedBlockDiagonalPaddedKeysMask from_seqstarts(Int32Table q_starts, Int32Table kv_seqlen,
                                                         const BlockTables& tables);

 protected:
  friend class BlockDiagonalPaddedKeysMask;
  using SequenceMask::SequenceMask;
};

/// And j <= i + s.
class ATTUNE_EXPORT PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    : public PagedBlockDiagonalPaddedKeysMask {
 public:
  static PagedBlockDiagonalCausalWithOffsetPaddedKeysMask from_seqlens(const SeqLens& q_seqlen,
                                                                       const SeqLens& kv_seqlen,
                                                                       const BlockTables& tables);
  static PagedBlockDiagonalCausalWithOffsetPaddedKeysMask from_seqstarts(Int32Table q_starts,
                                                                         Int32Table kv_seqlen,
                                                                         const BlockTables& tables);

 protected:
  using PagedBlockDiagonalPaddedKeysMask::PagedBlockDiagonalPaddedKeysMask;
};

/// Logical keys [kv_seqstarts[b], kv_seqstarts[b] + kv_seqlen[b]) of each sequence's own row of pages. As
/// many starts as sequences.
class ATTUNE_EXPORT PagedBlockDiagonalGappyKeysMask : public SequenceMask {
 public:
  static PagedBlockDiagonalGappyKeysMask from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                                                      const SeqLens& kv_seqlen, const BlockTables& tables);
  static PagedBlockDiagonalGappyKeysMask from_seqstarts(Int32Table q_starts, Int32Table kv_seqstarts,
                                                        Int32Table kv_seqlen, const BlockTables& tables);

 protected:
  friend class BlockDiagonalGappyKeysMask;
  using SequenceMask::SequenceMask;
};

/// And j <= i + s.
class ATTUNE_EXPORT PagedBlockDiagonalCausalWithOffsetGappyKeysMask : public PagedBlockDiagonalGappyKeysMask {
 public:
  static PagedBlockDiagonalCausalWithOffsetGappyKeysMask from_seqlens(const SeqLens& q_seqlen,
                                                                      const SeqLens& kv_seqstarts,
                                                                      const SeqLens& kv_seqlen,
                                                                      const BlockTables& tables);
  static PagedBlockDiagonalCausalWithOffsetGappyKeysMask from_seqstarts(Int32Table q_starts,
                                                                        Int32Table kv_seqstarts,
                                                                        Int32Table kv_seqlen,
                                                                        const BlockTables& tables);

 protected:
  using PagedBlockDiagonalGappyKeysMask::PagedBlockDiagonalGappyKeysMask;
};

}  // namespace attune
