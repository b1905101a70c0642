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

typedef enum attune_dtype { ATTUNE_F32 = 0, ATTUNE_F16 = 1, ATTUNE_BF16 = 2 } attune_dtype;
typedef enum attune_device_type { ATTUNE_CPU = 0, ATTUNE_CUDA = 1 } attune_device_type;
typedef enum attune_family {
  ATTUNE_AUTOMATIC = 0,
  ATTUNE_FAMILY_CPU = 1,
  ATTUNE_FAMILY_SIMT = 2,
  ATTUNE_FAMILY_MMA = 3
} attune_family;

typedef enum attune_bias_kind {
  ATTUNE_BIAS_NONE = 0,
  ATTUNE_BIAS_LOWER_TRIANGULAR = 1,
  ATTUNE_BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT = 2,
  ATTUNE_BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT_LOCAL = 3, /* window_size */
  ATTUNE_BIAS_LOCAL_FROM_BOTTOM_RIGHT = 4                   /* window_left, window_right */
} attune_bias_kind;

#define ATTUNE_MAX_RANK 5

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

typedef struct attune_bias {
  size_t struct_size;
  int32_t kind; /* attune_bias_kind */
  int64_t window_size;
  int64_t window_left;
  int64_t window_right;
} attune_bias;
#define ATTUNE_BIAS_INIT \
  { sizeof(attune_bias), ATTUNE_BIAS_NONE, 0, 0, 0 }

typedef struct attune_options {
  size_t struct_size;
  const double* scale; /* null: head_dim ** -0.5 */
  void* stream;        /* CUstream; null: the default stream */
  int32_t family;      /* attune_family */
} attune_options;
#define ATTUNE_OPTIONS_INIT \
  { sizeof(attune_options), NULL, NULL, ATTUNE_AUTOMATIC }

typedef struct attune_counters {
  size_t struct_size;
  uint64_t compiles, loads, launches, cache_hits, cache_misses, cache_defects, cache_stores;
} attune_counters;

ATTUNE_EXPORT const char* attune_version(void);
ATTUNE_EXPORT const char* attune_status_name(attune_status status);
/* Never null; valid until the thread's next call. */
ATTUNE_EXPORT const char* attune_last_error(void);

/* bias, options and lse may be null. lse is [B, H, Mq] float32, contiguous. */
ATTUNE_EXPORT attune_status attune_memory_efficient_attention_forward(
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_tensor* output, const attune_tensor* lse, const attune_bias* bias,
    const attune_options* options);

ATTUNE_EXPORT attune_status attune_prepare(const attune_tensor* query, const attune_tensor* key,
                                           const attune_tensor* value, int with_lse, const attune_bias* bias,
                                           const attune_options* options);

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
