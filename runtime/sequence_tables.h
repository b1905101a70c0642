// The tables of packed sequences for each kind of key addressing, from lists of the host or from tables that
// a device may hold. `name`, the bias class, begins every refusal. Lists and whatever of the tables the host
// knows are checked; all throw invalid_argument.
#pragma once

#include "attune/attn_bias.h"

#include <cstdint>
#include <string_view>

namespace attune::runtime {

/// Block b's keys are the rows [k_starts[b], k_starts[b + 1]).
Sequences contiguous(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqlen);
Sequences contiguous(std::string_view name, Int32Table q_starts, Int32Table k_starts);

/// Block b's keys are the first rows of [b * padding, (b + 1) * padding).
Sequences padded(std::string_view name, const SeqLens& q_seqlen, std::int64_t padding,
                 const SeqLens& kv_seqlen);
Sequences padded(std::string_view name, Int32Table q_starts, std::int64_t padding, Int32Table kv_seqlen);

/// Block b's keys are the rows from kv_seqstarts[b] on.
Sequences gappy(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                const SeqLens& kv_seqlen);
Sequences gappy(std::string_view name, Int32Table q_starts, Int32Table kv_seqstarts, Int32Table kv_seqlen);

/// Block b's keys are the logical keys from kv_seqstarts[b] on of its row of pages.
Sequences paged(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                const SeqLens& kv_seqlen, const BlockTables& tables);
Sequences paged(std::string_view name, Int32Table q_starts, Int32Table kv_seqstarts, Int32Table kv_seqlen,
                const BlockTables& tables);

/// Likewise, from 0 on.
Sequences paged(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqlen,
                const BlockTables& tables);
Sequences paged(std::string_view name, Int32Table q_starts, Int32Table kv_seqlen, const BlockTables& tables);

/// The same blocks behind pages: block b lives in the logical keys [b * notional_padding, (b + 1) *
/// notional_padding), of which its row of pages holds the first.
Sequences paged_cells(std::string_view name, const Sequences& gappy, const BlockTables& tables,
                      std::int64_t notional_padding);

}  // namespace attune::runtime
