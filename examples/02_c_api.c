/* The same from C: one causal attention into the caller's own memory, with its log-sum-exp. */
#include <attune/attune_c.h>

#include <stdio.h>

enum { LEN = 16, HEADS = 2, HEAD_DIM = 32 };

static float query[LEN * HEADS * HEAD_DIM];
static float key[LEN * HEADS * HEAD_DIM];
static float value[LEN * HEADS * HEAD_DIM];
static float output[LEN * HEADS * HEAD_DIM];
static float lse[HEADS * LEN];

/* [1, LEN, HEADS, HEAD_DIM], row-major. */
static attune_tensor bmhk(float* data) {
  const attune_tensor tensor = {.data = data,
                                .dtype = ATTUNE_F32,
                                .device_type = ATTUNE_CPU,
                                .rank = 4,
                                .shape = {1, LEN, HEADS, HEAD_DIM},
                                .strides = {LEN * HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEAD_DIM, 1}};
  return tensor;
}

int main(void) {
  const attune_tensor q = bmhk(query), k = bmhk(key), v = bmhk(value), out = bmhk(output);
  const attune_tensor l = {.data = lse,
                           .dtype = ATTUNE_F32,
                           .rank = 3,
                           .shape = {1, HEADS, LEN},
                           .strides = {HEADS * LEN, LEN, 1}};
  attune_bias causal = ATTUNE_BIAS_INIT;
  causal.window_right = 0; /* no key to the right of the query's own position */
  for (int i = 0; i < LEN * HEADS * HEAD_DIM; ++i) value[i] = 1;

  const attune_status status = attune_memory_efficient_attention_forward(&q, &k, &v, &out, &l, &causal, NULL);
  if (status != ATTUNE_OK) {
    fprintf(stderr, "%s: %s\n", attune_status_name(status), attune_last_error());
    return 1;
  }
  /* All scores are 0, so the last query's lse is ln(16). */
  printf("output[0] = %g, last lse = %g, by %s\n", output[0], lse[HEADS * LEN - 1], attune_last_kernel());
  return 0;
}
