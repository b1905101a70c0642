/* Attune's C ABI. Every function returns a status; attune_last_error() has the text of the calling thread's
 * last failure. Structs that may grow begin with struct_size: set it with the INIT macro, leave the rest zero
 * for the defaults. See attune.h for what each call computes. */
#ifndef ATTUNE_C_H
#define ATTUNE_C_H

#include <stddef.h>
#include <stdint.h>

#ifndef ATTUNE_EXPORT
#define ATTUNE_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attune_status {
  ATTUNE_OK = 0,
  ATTUNE_INVALID_ARGUMENT = 1, /* fix the call */
  ATTUNE_UNSUPPORTED = 2,      /* no kernel does it here */
  ATTUNE_ENVIRONMENT = 3,      /* driver, compiler or disk */
  ATTUNE_INTERNAL = 4          /* a defect of Attune */
} attune_status;

typedef enum attune_dtype {
  ATTUNE_F32 = 0,
  ATTUNE_F16 = 1,
  ATTUNE_BF16 = 2,
  ATTUNE_BOOLEAN = 3, /* one byte: bias tensors */
  ATTUNE_I32 = 4      /* tables of a bias */
} attune_dtype;
typedef enum attune_device_type { ATTUNE_CPU = 0, ATTUNE_CUDA = 1 } attune_device_type;
typedef enum attune_family {
  ATTUNE_AUTOMATIC = 0,
  ATTUNE_FAMILY_CPU = 1,
  ATTUNE_FAMILY_SIMT = 2,
  ATTUNE_FAMILY_MMA = 3,
  ATTUNE_FAMILY_SM90 = 4
} attune_family;

typedef enum attune_anchor { ATTUNE_TOP_LEFT = 0, ATTUNE_BOTTOM_RIGHT = 1 } attune_anchor;

#define ATTUNE_MAX_RANK 6

/* A view of the caller's memory; shape and strides in elements. */
typedef struct attune_tensor {
  void* data;
  int32_t dtype;       /* attune_dtype */
  int32_t device_type; /* attune_device_type */
  int32_t device_index;
  int32_t rank;
  int64_t shape[ATTUNE_MAX_RANK];
  int64_t strides[ATTUNE_MAX_RANK];
} attune_tensor;

/* What every bias class of the documentation reduces to; docs/semantics.md has the table. Query i of a block
 * sees key j of it iff i + s - window_left <= j <= i + s + window_right, where s is 0 (top left) or the
 * block's keys less its queries (bottom right); a negative reach is no bound.
 *
 * With q_starts, the queries and keys of `sequences` blocks are packed on the sequence axis (batch 1). Tables
 * are contiguous i32 tensors on the inputs' device; for CUDA inputs nothing is read back and nothing waits. A
 * table that is on the CPU instead is checked, and copied (which waits) when the inputs are on a GPU. */
typedef struct attune_bias {
  size_t struct_size;
  int32_t anchor; /* attune_anchor */
  int64_t window_left;
  int64_t window_right;
  const attune_tensor* tensor;   /* null, or dense: f32, f16, bf16 is added, boolean true is visible */
  int64_t sequences;             /* 0: one block per batch entry */
  const attune_tensor* q_starts; /* [sequences + 1] */
  const attune_tensor* k_starts; /* [sequences + 1], or at least [sequences] with k_lens */
  const attune_tensor* k_lens;   /* null: k_starts[b + 1] - k_starts[b]; else [sequences] */
  const attune_tensor*
      block_tables; /* null, or paged: [sequences, pages of a row]; k_starts are then logical */
  int64_t page_size;
  const char* name; /* for messages; may be null */
  int64_t page_run; /* paged: divides page_size and every k_start, of which a GPU then reads so many keys at
                       once; 0: not known, unless k_starts are on the CPU */
} attune_bias;
#define ATTUNE_BIAS_INIT \
  { sizeof(attune_bias), ATTUNE_TOP_LEFT, -1, -1, NULL, 0, NULL, NULL, NULL, NULL, 0, NULL, 0 }

typedef struct attune_options {
  size_t struct_size;
  const double* scale; /* null: head_dim ** -0.5 */
  void* stream;        /* CUstream; null: the default stream */
  uint32_t families;   /* bits 1 << attune_family of those that may run; 0: any */
  double p;            /* dropout probability, rounded to a multiple of 2^-16 */
  uint64_t seed;       /* which pairs are dropped: a function of seed, offset, block, head, query and key */
  uint64_t offset;
  const int32_t* output_dtype; /* attune_dtype, null: the query's. For prepare, explain and the reasons; calls
                                  that compute have their output tensor */
  void* workspace; /* of forward calls. Null: allocated in the stream's order; else at a multiple of 256 */
  size_t workspace_bytes;
} attune_options;
#define ATTUNE_OPTIONS_INIT \
  { sizeof(attune_options), NULL, NULL, 0, 0.0, 0, 0, NULL, NULL, 0 }

/* Where gradients go; null: not wanted. See GradientViews in attune.h. */
typedef struct attune_gradients {
  size_t struct_size;
  const attune_tensor* query;
  const attune_tensor* key;
  const attune_tensor* value;
  const attune_tensor* bias;
} attune_gradients;
#define ATTUNE_GRADIENTS_INIT \
  { sizeof(attune_gradients), NULL, NULL, NULL, NULL }

typedef struct attune_backward_options {
  size_t struct_size;
  const attune_tensor* grad_lse; /* null: 0 */
  int32_t deterministic;         /* 1: the same bits in every run */
  void* workspace;               /* null: allocated in the stream's order; else at a multiple of 256 */
  size_t workspace_bytes;
} attune_backward_options;
#define ATTUNE_BACKWARD_OPTIONS_INIT \
  { sizeof(attune_backward_options), NULL, 0, NULL, 0 }

typedef struct attune_counters {
  size_t struct_size;
  uint64_t compiles, loads, launches, cache_hits, cache_misses, cache_defects, cache_stores;
} attune_counters;

ATTUNE_EXPORT const char* attune_version(void);
ATTUNE_EXPORT const char* attune_status_name(attune_status status);
/* Never null; valid until the thread's next call. */
ATTUNE_EXPORT const char* attune_last_error(void);

/* bias, options and lse may be null. lse is [B, H, Mq] or [B, G, H, Mq] float32, contiguous. The output's
 * dtype may be any of the three floating ones. */
ATTUNE_EXPORT attune_status attune_memory_efficient_attention_forward(
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_tensor* output, const attune_tensor* lse, const attune_bias* bias,
    const attune_options* options);

/* See attune.h. Touches no data. */
ATTUNE_EXPORT attune_status attune_forward_workspace_bytes(const attune_tensor* query,
                                                           const attune_tensor* key,
                                                           const attune_tensor* value, int with_lse,
                                                           const attune_bias* bias,
                                                           const attune_options* options, size_t* bytes);

/* The same call again and again: described once, then run with memory after memory, for callers to whom a
 * description costs more than the call. `create` checks nothing and keeps copies: neither the structs nor the
 * tensors have to live on, but the tables of a bias that are on a GPU, whose numbers are read by each run; of
 * tables on the CPU the numbers are kept. `run` checks all that the plain call checks, and may be called from
 * any number of threads. `destroy` takes null, and no call that still runs. */
typedef struct attune_forward_call attune_forward_call;

/* What changes from run to run. `lse` and `bias` count where the call has them, seed and offset where it
 * drops. */
typedef struct attune_forward_memory {
  size_t struct_size;
  const void* query;
  const void* key;
  const void* value;
  void* output;
  void* lse;
  const void* bias;
  void* stream;
  uint64_t seed;
  uint64_t offset;
  void* workspace; /* as in attune_options */
  size_t workspace_bytes;
} attune_forward_memory;
#define ATTUNE_FORWARD_MEMORY_INIT \
  { sizeof(attune_forward_memory), NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, 0 }

ATTUNE_EXPORT attune_status attune_forward_call_create(const attune_tensor* query, const attune_tensor* key,
                                                       const attune_tensor* value,
                                                       const attune_tensor* output, const attune_tensor* lse,
                                                       const attune_bias* bias, const attune_options* options,
                                                       attune_forward_call** call);
/* As attune_forward_workspace_bytes of these arguments. */
ATTUNE_EXPORT attune_status attune_forward_call_workspace_bytes(const attune_forward_call* call,
                                                                size_t* bytes);
ATTUNE_EXPORT attune_status attune_forward_call_run(const attune_forward_call* call,
                                                    const attune_forward_memory* memory);
ATTUNE_EXPORT void attune_forward_call_destroy(attune_forward_call* call);

/* Gradients of the same attention; see attune.h. bias, options and backward may be null. The next three take
 * the same arguments and touch no data. */
ATTUNE_EXPORT attune_status attune_memory_efficient_attention_backward(
    const attune_tensor* grad_output, const attune_tensor* output, const attune_tensor* lse,
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_gradients* gradients, const attune_bias* bias, const attune_options* options,
    const attune_backward_options* backward);
ATTUNE_EXPORT attune_status attune_backward_workspace_bytes(
    const attune_tensor* grad_output, const attune_tensor* output, const attune_tensor* lse,
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_gradients* gradients, const attune_bias* bias, const attune_options* options,
    const attune_backward_options* backward, size_t* bytes);
ATTUNE_EXPORT attune_status attune_prepare_backward(const attune_tensor* grad_output,
                                                    const attune_tensor* output, const attune_tensor* lse,
                                                    const attune_tensor* query, const attune_tensor* key,
                                                    const attune_tensor* value,
                                                    const attune_gradients* gradients,
                                                    const attune_bias* bias, const attune_options* options,
                                                    const attune_backward_options* backward);
/* *json is a NUL-terminated JSON object; release it with attune_free. */
ATTUNE_EXPORT attune_status attune_explain_backward(const attune_tensor* grad_output,
                                                    const attune_tensor* output, const attune_tensor* lse,
                                                    const attune_tensor* query, const attune_tensor* key,
                                                    const attune_tensor* value,
                                                    const attune_gradients* gradients,
                                                    const attune_bias* bias, const attune_options* options,
                                                    const attune_backward_options* backward, char** json);

/* As attune_forward_call, of a backward pass. */
typedef struct attune_backward_call attune_backward_call;

/* Gradients count where the call wants them, bias and grad_lse where it has them, seed and offset where it
 * drops. */
typedef struct attune_backward_memory {
  size_t struct_size;
  const void* grad_output;
  const void* output;
  const void* lse;
  const void* query;
  const void* key;
  const void* value;
  void* grad_query;
  void* grad_key;
  void* grad_value;
  void* grad_bias;
  const void* bias;
  const void* grad_lse;
  void* stream;
  uint64_t seed;
  uint64_t offset;
  void* workspace; /* as in attune_backward_options */
  size_t workspace_bytes;
} attune_backward_memory;
#define ATTUNE_BACKWARD_MEMORY_INIT                                                                         \
  {                                                                                                         \
    sizeof(attune_backward_memory), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, \
        NULL, 0, 0, NULL, 0                                                                                 \
  }

ATTUNE_EXPORT attune_status attune_backward_call_create(
    const attune_tensor* grad_output, const attune_tensor* output, const attune_tensor* lse,
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_gradients* gradients, const attune_bias* bias, const attune_options* options,
    const attune_backward_options* backward, attune_backward_call** call);
/* As attune_backward_workspace_bytes of these arguments. */
ATTUNE_EXPORT attune_status attune_backward_call_workspace_bytes(const attune_backward_call* call,
                                                                 size_t* bytes);
ATTUNE_EXPORT attune_status attune_backward_call_run(const attune_backward_call* call,
                                                     const attune_backward_memory* memory);
ATTUNE_EXPORT void attune_backward_call_destroy(attune_backward_call* call);

ATTUNE_EXPORT attune_status attune_prepare(const attune_tensor* query, const attune_tensor* key,
                                           const attune_tensor* value, int with_lse, const attune_bias* bias,
                                           const attune_options* options);

/* `chunks` tensors each; lse_out and options may be null. See merge_attentions in attune.h. */
ATTUNE_EXPORT attune_status attune_merge_attentions(const attune_tensor* attn, const attune_tensor* lse,
                                                    size_t chunks, const attune_tensor* output,
                                                    const attune_tensor* lse_out,
                                                    const attune_options* options);

/* Gradients of the same merge, `chunks` of attn, attn_lse, grad_attn and grad_attn_lse each; grad_lse and
 * options may be null. See merge_attentions_backward in attune.h. */
ATTUNE_EXPORT attune_status attune_merge_attentions_backward(
    const attune_tensor* grad_output, const attune_tensor* grad_lse, const attune_tensor* output,
    const attune_tensor* lse, const attune_tensor* attn, const attune_tensor* attn_lse, size_t chunks,
    const attune_tensor* grad_attn, const attune_tensor* grad_attn_lse, const attune_options* options);

/* family is an attune_family. *json is a JSON array of texts, empty when the family can run the call; release
 * it with attune_free. */
ATTUNE_EXPORT attune_status attune_not_supported_reasons(int32_t family, const attune_tensor* query,
                                                         const attune_tensor* key, const attune_tensor* value,
                                                         const attune_bias* bias,
                                                         const attune_options* options, char** json);

/* The same about the gradients of query, key and value. */
ATTUNE_EXPORT attune_status attune_backward_not_supported_reasons(int32_t family, const attune_tensor* query,
                                                                  const attune_tensor* key,
                                                                  const attune_tensor* value,
                                                                  const attune_bias* bias,
                                                                  const attune_options* options, char** json);

/* *json is a NUL-terminated JSON object; release it with attune_free. */
ATTUNE_EXPORT attune_status attune_explain(const attune_tensor* query, const attune_tensor* key,
                                           const attune_tensor* value, int with_lse, const attune_bias* bias,
                                           const attune_options* options, char** json);
ATTUNE_EXPORT void attune_free(void* pointer);

ATTUNE_EXPORT attune_status attune_get_counters(attune_counters* counters);
/* The candidate that the calling thread's last attention call ran; never null. */
ATTUNE_EXPORT const char* attune_last_kernel(void);

#ifdef __cplusplus
}
#endif

#endif /* ATTUNE_C_H */
