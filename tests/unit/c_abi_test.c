/* The C ABI from C: every function, every status that a caller can cause, and the texts of the failures.
 * Compiled as C11: that it compiles is half of the test. */
#include "attune/attune_c.h"
#include "attune/version.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void check(int holds, const char* what, int line) {
  if (holds) return;
  fprintf(stderr, "line %d: %s does not hold; last error: \"%s\"\n", line, what, attune_last_error());
  ++failures;
}
#define CHECK(condition) check((condition), #condition, __LINE__)

static void check_text(const char* actual, const char* expected, int line) {
  if (strcmp(actual, expected) == 0) return;
  fprintf(stderr, "line %d: got \"%s\", expected \"%s\"\n", line, actual, expected);
  ++failures;
}
#define CHECK_TEXT(actual, expected) check_text((actual), (expected), __LINE__)

/* The call must be refused as an invalid argument with exactly this text. */
#define CHECK_REFUSED(call, text)             \
  do {                                        \
    CHECK((call) == ATTUNE_INVALID_ARGUMENT); \
    CHECK_TEXT(attune_last_error(), text);    \
  } while (0)

/* One batch, one head, head_dim 2: the query meets key 0 with score 0 and key 1 with score 1. */
static float query_data[] = {1, 0, 1, 0};
static float key_data[] = {0, 0, 1, 0};
static float value_data[] = {2, 4};
static float output_data[2];
static float lse_data[2];

/* A table of n numbers. */
static attune_tensor table(int32_t* data, int64_t n) {
  attune_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = ATTUNE_I32;
  t.rank = 1;
  t.shape[0] = n;
  t.strides[0] = 1;
  return t;
}

static attune_tensor tensor(float* data, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
  attune_tensor t;
  int axis;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = ATTUNE_F32;
  t.device_type = ATTUNE_CPU;
  t.rank = rank;
  t.shape[0] = a;
  t.shape[1] = b;
  t.shape[2] = c;
  t.shape[3] = d;
  t.strides[rank - 1] = 1;
  for (axis = rank - 2; axis >= 0; --axis) t.strides[axis] = t.strides[axis + 1] * t.shape[axis + 1];
  return t;
}

static attune_tensor query, key, value, output, lse;

static void make_tensors(void) {
  query = tensor(query_data, 4, 1, 2, 1, 2);
  key = tensor(key_data, 4, 1, 2, 1, 2);
  value = tensor(value_data, 4, 1, 2, 1, 1);
  output = tensor(output_data, 4, 1, 2, 1, 1);
  lse = tensor(lse_data, 3, 1, 1, 2, 0);
}

static attune_status forward(const attune_bias* bias, const attune_options* options) {
  output_data[0] = output_data[1] = lse_data[0] = lse_data[1] = 99;
  return attune_memory_efficient_attention_forward(&query, &key, &value, &output, &lse, bias, options);
}

static int near(double actual, double expected) {
  return fabs(actual - expected) <= 1e-6 * (1 + fabs(expected));
}

static void test_names(void) {
  CHECK_TEXT(attune_version(), ATTUNE_VERSION);
  CHECK_TEXT(attune_status_name(ATTUNE_OK), "ok");
  CHECK_TEXT(attune_status_name(ATTUNE_INVALID_ARGUMENT), "invalid argument");
  CHECK_TEXT(attune_status_name(ATTUNE_UNSUPPORTED), "unsupported");
  CHECK_TEXT(attune_status_name(ATTUNE_ENVIRONMENT), "environment");
  CHECK_TEXT(attune_status_name(ATTUNE_INTERNAL), "internal");
  CHECK_TEXT(attune_status_name((attune_status)99), "unknown status");
}

/* Masks as windows. */
static attune_bias window(int32_t anchor, int64_t left, int64_t right) {
  attune_bias bias = ATTUNE_BIAS_INIT;
  bias.anchor = anchor;
  bias.window_left = left;
  bias.window_right = right;
  return bias;
}

static void test_refusals(void) {
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  attune_counters counters = {sizeof(attune_counters), 0, 0, 0, 0, 0, 0, 0};
  double scale = NAN;
  int32_t dtype = ATTUNE_I32;
  char* json = NULL;

  CHECK_REFUSED(attune_memory_efficient_attention_forward(NULL, &key, &value, &output, NULL, NULL, NULL),
                "query: null tensor");
  CHECK_REFUSED(attune_memory_efficient_attention_forward(&query, NULL, &value, &output, NULL, NULL, NULL),
                "key: null tensor");
  CHECK_REFUSED(attune_memory_efficient_attention_forward(&query, &key, NULL, &output, NULL, NULL, NULL),
                "value: null tensor");
  CHECK_REFUSED(attune_memory_efficient_attention_forward(&query, &key, &value, NULL, NULL, NULL, NULL),
                "output: null tensor");
  CHECK_REFUSED(attune_prepare(NULL, &key, &value, 0, NULL, NULL), "query: null tensor");
  CHECK_REFUSED(attune_explain(&query, &key, NULL, 0, NULL, NULL, &json), "value: null tensor");
  CHECK_REFUSED(attune_explain(&query, &key, &value, 0, NULL, NULL, NULL), "explain: null json");
  CHECK_REFUSED(attune_not_supported_reasons(ATTUNE_AUTOMATIC, &query, &key, &value, NULL, NULL, NULL),
                "not_supported_reasons: null json");
  CHECK_REFUSED(attune_not_supported_reasons(ATTUNE_AUTOMATIC, NULL, &key, &value, NULL, NULL, &json),
                "query: null tensor");
  CHECK_REFUSED(attune_not_supported_reasons((attune_family)99, &query, &key, &value, NULL, NULL, &json),
                "unknown family 99");
  CHECK_REFUSED(attune_merge_attentions(NULL, NULL, 1, &output, NULL, NULL), "attn: null tensor");
  CHECK_REFUSED(attune_merge_attentions(&value, NULL, 1, &output, NULL, NULL), "lse: null tensor");
  CHECK_REFUSED(attune_merge_attentions(&value, &lse, 1, NULL, NULL, NULL), "output: null tensor");
  CHECK_REFUSED(
      attune_merge_attentions_backward(&output, NULL, &output, &lse, &value, &lse, 1, NULL, NULL, NULL),
      "grad_attn: null tensor");
  CHECK_REFUSED(attune_merge_attentions(&value, &lse, 0, &output, NULL, NULL),
                "merge_attentions: 0 attention chunks and 0 lse chunks, expected equally many, at least one");
  CHECK(json == NULL);

  query.data = NULL;
  CHECK_REFUSED(forward(NULL, NULL), "query: null data pointer");
  make_tensors();
  query.dtype = 7;
  CHECK_REFUSED(forward(NULL, NULL), "query: unknown dtype 7");
  make_tensors();
  key.device_type = 5;
  CHECK_REFUSED(forward(NULL, NULL), "key: unknown device (type 5, index 0)");
  make_tensors();
  value.rank = 1000;
  CHECK_REFUSED(forward(NULL, NULL), "value: rank 1000, expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]");
  make_tensors();
  query.shape[1] = -1;
  CHECK_REFUSED(forward(NULL, NULL), "query: axis 1 of shape [1, -1, 1, 2] is negative");
  make_tensors();
  lse.dtype = ATTUNE_F16;
  CHECK_REFUSED(forward(NULL, NULL), "lse: expected float32 [1, 1, 2]");
  make_tensors();

  bias.struct_size = 0;
  CHECK_REFUSED(forward(&bias, NULL), "bias: struct_size 0 is not set; start from its INIT macro");
  bias.struct_size = sizeof bias;
  bias.anchor = 77;
  CHECK_REFUSED(forward(&bias, NULL), "bias: unknown anchor 77");
  bias.name = "MyMask";
  CHECK_REFUSED(forward(&bias, NULL), "MyMask: unknown anchor 77");

  options.struct_size = 0;
  CHECK_REFUSED(forward(NULL, &options), "options: struct_size 0 is not set; start from its INIT macro");
  options.struct_size = sizeof options;
  options.families = 1u << 12;
  CHECK_REFUSED(forward(NULL, &options), "options: families 0x1000 has bits beyond those of attune_family");
  options.families = 0;
  options.p = -1;
  CHECK_REFUSED(forward(NULL, &options), "Invalid dropout probability: p=-1, expected 0 to 1");
  options.p = 0;
  options.output_dtype = &dtype;
  CHECK_REFUSED(attune_prepare(&query, &key, &value, 0, NULL, &options),
                "output_dtype is i32, expected f32, f16 or bf16");
  options.output_dtype = NULL;
  options.scale = &scale;
  CHECK_REFUSED(forward(NULL, &options), "scale is nan, expected a finite float32");

  CHECK_REFUSED(attune_get_counters(NULL), "counters: null pointer");
  counters.struct_size = 0;
  CHECK_REFUSED(attune_get_counters(&counters),
                "counters: struct_size 0 is not set; start from its INIT macro");

  /* Nothing was touched by any of them. */
  CHECK(output_data[0] == 99 && output_data[1] == 99);
  CHECK_TEXT(attune_last_kernel(), "");
}

static void test_refused_sequences(void) {
  int32_t starts[] = {0, 1, 2};
  float bias_data[4] = {0, 0, 0, 0};
  attune_tensor q_starts = table(starts, 3), k_starts = table(starts, 3), flat = table(starts, 3);
  attune_tensor dense = tensor(bias_data, 2, 2, 3, 0, 0);
  attune_bias bias = ATTUNE_BIAS_INIT;

  bias.sequences = 2;
  CHECK_REFUSED(forward(&bias, NULL), "bias: q_starts is null, but the bias has sequences");
  bias.q_starts = &q_starts;
  CHECK_REFUSED(forward(&bias, NULL), "bias: k_starts is null, but the bias has sequences");
  bias.k_starts = &k_starts;
  bias.block_tables = &flat;
  CHECK_REFUSED(forward(&bias, NULL), "bias: block_tables has rank 1, expected [sequences, pages]");
  bias.block_tables = NULL;
  starts[2] = 1;
  CHECK_REFUSED(forward(&bias, NULL), "bias: the sequences have 1 rows together, but query has 2");
  starts[2] = 2;
  q_starts.dtype = ATTUNE_F32;
  CHECK(forward(&bias, NULL) == ATTUNE_INVALID_ARGUMENT);
  CHECK(strstr(attune_last_error(), "must be an i32 tensor") != NULL);
  q_starts = table(starts, 3);
  q_starts.shape[0] = -3;
  CHECK(forward(&bias, NULL) == ATTUNE_INVALID_ARGUMENT);
  CHECK(strstr(attune_last_error(), "has extent -3 on axis 0, expected 0 to 2^29") != NULL);
  q_starts.rank = 7;
  CHECK_REFUSED(forward(&bias, NULL), "bias: q_starts has rank 7, expected 1");

  bias = window(ATTUNE_TOP_LEFT, -1, -1);
  bias.tensor = &dense;
  CHECK_REFUSED(forward(&bias, NULL),
                "attn_bias: shape [2, 3], expected [1 or 1, 1 or 1, 2 or 1, 2], or the same without heads or "
                "without batch and heads");
}

static void test_unsupported(void) {
  attune_options options = ATTUNE_OPTIONS_INIT;
  char* json = NULL;
  options.families = 1u << ATTUNE_FAMILY_MMA;
  CHECK(forward(NULL, &options) == ATTUNE_UNSUPPORTED);
  CHECK(strstr(attune_last_error(), "the call allows mma alone") != NULL);

  CHECK(attune_not_supported_reasons(ATTUNE_FAMILY_MMA, &query, &key, &value, NULL, NULL, &json) ==
        ATTUNE_OK);
  CHECK_TEXT(json, "[\"mma kernels do not run on cpu tensors\"]");
  attune_free(json);
  CHECK(attune_not_supported_reasons(ATTUNE_FAMILY_CPU, &query, &key, &value, NULL, NULL, &json) ==
        ATTUNE_OK);
  CHECK_TEXT(json, "[]");
  attune_free(json);
  query.rank = 3;
  CHECK(attune_not_supported_reasons(ATTUNE_AUTOMATIC, &query, &key, &value, NULL, NULL, &json) == ATTUNE_OK);
  CHECK_TEXT(json, "[\"query and key differ in rank (3 and 4): all should be BMHK, all BMK or all BMGHK\"]");
  attune_free(json);
  make_tensors();
}

static void test_forward(void) {
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  const double scale = 1;
  const double e = exp(1.0);
  const double both = (2 + 4 * e) / (1 + e);

  options.scale = &scale;
  CHECK(forward(NULL, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], both) && near(output_data[1], both));
  CHECK(near(lse_data[0], log(1 + e)) && near(lse_data[1], log(1 + e)));
  CHECK(strncmp(attune_last_kernel(), "cpu_", 4) == 0);

  bias = window(ATTUNE_TOP_LEFT, -1, 0); /* causal */
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], both));
  bias = window(ATTUNE_BOTTOM_RIGHT, 0, 0);
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], 4));
  bias = window(ATTUNE_BOTTOM_RIGHT, 0, 1);
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], both) && near(output_data[1], 4));

  /* The default scale, and neither lse nor bias nor options. */
  CHECK(attune_memory_efficient_attention_forward(&query, &key, &value, &output, NULL, NULL, NULL) ==
        ATTUNE_OK);
  CHECK(near(output_data[0], (2 + 4 * exp(sqrt(0.5))) / (1 + exp(sqrt(0.5)))));
}

/* One description, other memory in each run. */
static void test_forward_call(void) {
  float keys[] = {1, 0, 0, 0}, output_memory[] = {99, 99}, lse_memory[] = {99, 99}, added[] = {1, 0};
  attune_tensor tensor_bias = tensor(NULL, 2, 1, 2, 0, 0);
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  attune_forward_memory memory = ATTUNE_FORWARD_MEMORY_INIT;
  attune_forward_call *call = NULL, *plain = NULL;
  int32_t starts_data[] = {0, 1, 2};
  const attune_tensor starts = table(starts_data, 3);
  attune_bias packed = ATTUNE_BIAS_INIT;
  double scale = 1;
  const double e = exp(1.0);

  options.scale = &scale;
  bias.tensor = &tensor_bias;
  CHECK(attune_forward_call_create(&query, &key, &value, &output, &lse, &bias, &options, &call) == ATTUNE_OK);
  CHECK(attune_forward_call_create(&query, &key, &value, &output, NULL, NULL, NULL, &plain) == ATTUNE_OK);
  scale = 7; /* the call has its own */

  memory.query = query_data;
  memory.key = keys;
  memory.value = value_data;
  memory.output = output_memory;
  memory.lse = lse_memory;
  memory.bias = added; /* on top of the scores 1 and 0 */
  output_data[0] = 99;
  CHECK(attune_forward_call_run(call, &memory) == ATTUNE_OK);
  CHECK(near(output_memory[0], (2 * e * e + 4) / (e * e + 1)) && near(output_memory[1], output_memory[0]));
  CHECK(near(lse_memory[0], log(e * e + 1)) && output_data[0] == 99);
  added[0] = -1;
  CHECK(attune_forward_call_run(call, &memory) == ATTUNE_OK);
  CHECK(near(output_memory[0], 3));

  memory.key = key_data;
  memory.lse = memory.output = output_data; /* the lse does not count */
  memory.bias = NULL;
  CHECK(attune_forward_call_run(plain, &memory) == ATTUNE_OK);
  CHECK(near(output_data[0], (2 + 4 * exp(sqrt(0.5))) / (1 + exp(sqrt(0.5)))));

  /* Each run is checked as any call. */
  CHECK_REFUSED(attune_forward_call_run(call, &memory), "attn_bias: null data pointer");
  memory.query = NULL;
  CHECK_REFUSED(attune_forward_call_run(plain, &memory), "query: null data pointer");
  memory.query = output_data;
  CHECK_REFUSED(attune_forward_call_run(plain, &memory),
                "output: shares memory with query; give it memory of its own");
  CHECK_REFUSED(attune_forward_call_run(plain, NULL), "forward_call_run: null memory");
  CHECK_REFUSED(attune_forward_call_run(NULL, &memory), "forward_call_run: null call");
  memory.struct_size = 0;
  CHECK_REFUSED(attune_forward_call_run(plain, &memory),
                "forward memory: struct_size 0 is not set; start from its INIT macro");
  attune_forward_call_destroy(plain);
  attune_forward_call_destroy(call);

  /* It has its own numbers of tables on the CPU. */
  packed.sequences = 2;
  packed.q_starts = packed.k_starts = &starts;
  CHECK(attune_forward_call_create(&query, &key, &value, &output, NULL, &packed, NULL, &call) == ATTUNE_OK);
  starts_data[1] = 7;
  packed.q_starts = packed.k_starts = NULL;
  memory.struct_size = sizeof memory;
  memory.query = query_data;
  CHECK(attune_forward_call_run(call, &memory) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], 4));
  attune_forward_call_destroy(call);
  attune_forward_call_destroy(NULL);

  plain = NULL;
  CHECK_REFUSED(attune_forward_call_create(NULL, &key, &value, &output, NULL, NULL, NULL, &plain),
                "query: null tensor");
  CHECK_REFUSED(attune_forward_call_create(&query, &key, &value, NULL, NULL, NULL, NULL, &plain),
                "output: null tensor");
  CHECK_REFUSED(attune_forward_call_create(&query, &key, &value, &output, NULL, NULL, NULL, NULL),
                "forward_call_create: null call");
  CHECK(plain == NULL);
}

static void test_bias_tensor(void) {
  float added[] = {1, 0}; /* evens out the scores 0 and 1 */
  unsigned char seen[] = {1, 0};
  attune_tensor tensor_bias = tensor(added, 2, 1, 2, 0, 0);
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  const double scale = 1;
  options.scale = &scale;
  bias.tensor = &tensor_bias;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 3) && near(output_data[1], 3));
  tensor_bias.data = seen;
  tensor_bias.dtype = ATTUNE_BOOLEAN;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], 2));
}

static void test_sequences(void) {
  int32_t q_starts_data[] = {0, 1, 2}, k_starts_data[] = {0, 1, 2}, k_lens_data[] = {1, 0},
          pages_data[] = {1, 0};
  attune_tensor q_starts = table(q_starts_data, 3), k_starts = table(k_starts_data, 3);
  attune_tensor k_lens = table(k_lens_data, 2), pages = table(pages_data, 2);
  attune_bias bias = ATTUNE_BIAS_INIT;

  /* Two sequences of one query and one key each. */
  bias.sequences = 2;
  bias.q_starts = &q_starts;
  bias.k_starts = &k_starts;
  CHECK(forward(&bias, NULL) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], 4));
  CHECK(near(lse_data[0], 0) && near(lse_data[1], sqrt(0.5)));

  /* The second without a key. */
  bias.k_lens = &k_lens;
  CHECK(forward(&bias, NULL) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && output_data[1] == 0);
  CHECK(isinf(lse_data[1]) && lse_data[1] < 0);

  /* Pages of one key: the first sequence's is the second row, the second sequence's the first. */
  k_starts_data[1] = 0;
  k_lens_data[1] = 1;
  pages.rank = 2;
  pages.shape[0] = 2;
  pages.shape[1] = 1;
  pages.strides[0] = pages.strides[1] = 1;
  bias.block_tables = &pages;
  bias.page_size = 1;
  CHECK(forward(&bias, NULL) == ATTUNE_OK);
  CHECK(near(output_data[0], 4) && near(output_data[1], 2));
}

static void test_dropout(void) {
  attune_options options = ATTUNE_OPTIONS_INIT;
  float first[2];
  options.p = 0.5;
  options.seed = 3;
  CHECK(forward(NULL, &options) == ATTUNE_OK);
  memcpy(first, output_data, sizeof first);
  CHECK(forward(NULL, &options) == ATTUNE_OK);
  CHECK(memcmp(first, output_data, sizeof first) == 0);
  options.p = 1;
  CHECK(forward(NULL, &options) == ATTUNE_OK);
  CHECK(output_data[0] == 0 && output_data[1] == 0);
  CHECK(near(lse_data[0], log(1 + exp(sqrt(0.5))))); /* of undropped weights */
}

static void test_merge(void) {
  float attn_data[2][2] = {{2, 7}, {4, 9}};
  float chunk_lse[2][2];
  float merged[2], merged_lse[2];
  attune_tensor attn[2], lses[2], out, out_lse;
  int i;
  chunk_lse[0][0] = 0;
  chunk_lse[1][0] = (float)log(3.0);
  chunk_lse[0][1] = -INFINITY; /* saw no key */
  chunk_lse[1][1] = 1;
  for (i = 0; i < 2; ++i) {
    attn[i] = tensor(attn_data[i], 4, 1, 2, 1, 1);
    lses[i] = tensor(chunk_lse[i], 3, 1, 1, 2, 0);
  }
  out = tensor(merged, 4, 1, 2, 1, 1);
  out_lse = tensor(merged_lse, 3, 1, 1, 2, 0);
  CHECK(attune_merge_attentions(attn, lses, 2, &out, &out_lse, NULL) == ATTUNE_OK);
  CHECK(near(merged[0], 3.5) && near(merged[1], 9));
  CHECK(near(merged_lse[0], log(4.0)) && near(merged_lse[1], 1));
  CHECK(attune_merge_attentions(attn, lses, 2, &out, NULL, NULL) == ATTUNE_OK);
  CHECK(near(merged[0], 3.5));
}

/* The same merge: the first query's chunks weigh 1/4 and 3/4. */
static void test_merge_backward(void) {
  float attn_data[2][2] = {{2, 7}, {4, 9}};
  float chunk_lse[2][2];
  float merged[2] = {3.5f, 9}, merged_lse[2];
  float one = 1, two = 2;
  float grad_data[2][2], grad_lse_data[2][2];
  attune_tensor attn[2], lses[2], grads[2], grad_lses[2], out, out_lse, grad_output, grad_lse;
  int i;
  chunk_lse[0][0] = 0;
  chunk_lse[1][0] = (float)log(3.0);
  chunk_lse[0][1] = -INFINITY;
  chunk_lse[1][1] = 1;
  merged_lse[0] = (float)log(4.0);
  merged_lse[1] = 1;
  for (i = 0; i < 2; ++i) {
    attn[i] = tensor(attn_data[i], 4, 1, 2, 1, 1);
    lses[i] = tensor(chunk_lse[i], 3, 1, 1, 2, 0);
    grads[i] = tensor(grad_data[i], 4, 1, 2, 1, 1);
    grad_lses[i] = tensor(grad_lse_data[i], 3, 1, 1, 2, 0);
  }
  out = tensor(merged, 4, 1, 2, 1, 1);
  out_lse = tensor(merged_lse, 3, 1, 1, 2, 0);
  grad_output = tensor(&one, 4, 1, 2, 1, 1);
  grad_output.strides[1] = 0;
  grad_lse = tensor(&two, 3, 1, 1, 2, 0);
  grad_lse.strides[2] = 0;
  CHECK(attune_merge_attentions_backward(&grad_output, &grad_lse, &out, &out_lse, attn, lses, 2, grads,
                                         grad_lses, NULL) == ATTUNE_OK);
  CHECK(near(grad_data[0][0], 0.25) && near(grad_data[1][0], 0.75));
  CHECK(near(grad_lse_data[0][0], 0.25 * (2 - 1.5)) && near(grad_lse_data[1][0], 0.75 * (2 + 0.5)));
  CHECK(grad_data[0][1] == 0 && grad_lse_data[0][1] == 0);
  CHECK(near(grad_data[1][1], 1) && near(grad_lse_data[1][1], 2));
  CHECK(attune_merge_attentions_backward(&grad_output, NULL, &out, &out_lse, attn, lses, 2, grads, grad_lses,
                                         NULL) == ATTUNE_OK);
  CHECK(near(grad_lse_data[0][0], 0.25 * -1.5) && grad_lse_data[1][1] == 0);
}

static void test_prepare_and_explain(void) {
  char* json = NULL;
  attune_counters before = {sizeof(attune_counters), 0, 0, 0, 0, 0, 0, 0};
  attune_counters after = before;
  attune_counters old = before; /* of a caller that knows one counter */

  CHECK(attune_prepare(&query, &key, &value, 1, NULL, NULL) == ATTUNE_OK);
  CHECK(attune_get_counters(&before) == ATTUNE_OK);
  CHECK(before.loads >= 1);
  CHECK(forward(NULL, NULL) == ATTUNE_OK);
  CHECK(attune_get_counters(&after) == ATTUNE_OK);
  CHECK(after.struct_size == sizeof after);
  CHECK(after.launches == before.launches + 1);
  CHECK(after.compiles == before.compiles && after.loads == before.loads);

  old.struct_size = offsetof(attune_counters, loads);
  CHECK(attune_get_counters(&old) == ATTUNE_OK);
  CHECK(old.struct_size == offsetof(attune_counters, loads));
  CHECK(old.compiles == after.compiles && old.loads == 0 && old.launches == 0);

  CHECK(attune_explain(&query, &key, &value, 1, NULL, NULL, &json) == ATTUNE_OK);
  CHECK(json != NULL && json[0] == '{');
  CHECK(json != NULL && strstr(json, "\"family\":\"cpu\"") != NULL);
  CHECK(json != NULL && strstr(json, "\"state\":\"loaded\"") != NULL);
  attune_free(json);
  attune_free(NULL);
}

/* Weights w of the keys, v - output = -2 w1 and 2 w0: what the gradients of two queries with grad_output 1
 * are. */
static void test_backward(void) {
  const double scale = 1;
  const double w1 = exp(1) / (1 + exp(1)), w0 = 1 - w1;
  float grad_output_data[] = {1}, grad_lse_data[] = {0};
  float grad_query_data[5], grad_key_data[5], grad_value_data[3];
  char workspace_memory[1024 + 256];
  attune_tensor grad_output = tensor(grad_output_data, 4, 1, 2, 1, 1);
  attune_tensor grad_lse = tensor(grad_lse_data, 3, 1, 1, 2, 0);
  attune_tensor grad_query = tensor(grad_query_data, 4, 1, 2, 1, 2);
  attune_tensor grad_key = tensor(grad_key_data, 4, 1, 2, 1, 2);
  attune_tensor grad_value = tensor(grad_value_data, 4, 1, 2, 1, 1);
  attune_gradients gradients = ATTUNE_GRADIENTS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  attune_backward_options backward = ATTUNE_BACKWARD_OPTIONS_INIT;
  size_t bytes = 0;
  char* json = NULL;
  int i;

  options.scale = &scale;
  grad_output.strides[1] = 0; /* an expanded scalar */
  grad_lse.strides[2] = 0;
  gradients.query = &grad_query;
  gradients.key = &grad_key;
  gradients.value = &grad_value;
  backward.grad_lse = &grad_lse;
  backward.deterministic = 1;
  for (i = 0; i < 5; ++i) grad_query_data[i] = grad_key_data[i] = 99;
  for (i = 0; i < 3; ++i) grad_value_data[i] = 99;
  CHECK(forward(NULL, &options) == ATTUNE_OK);

  CHECK(attune_backward_workspace_bytes(&grad_output, &output, &lse, &query, &key, &value, &gradients, NULL,
                                        &options, &backward, &bytes) == ATTUNE_OK);
  CHECK(bytes > 0 && bytes <= 1024);
  backward.workspace = workspace_memory + (256 - (uintptr_t)workspace_memory % 256) % 256;
  backward.workspace_bytes = bytes;
  CHECK(attune_memory_efficient_attention_backward(&grad_output, &output, &lse, &query, &key, &value,
                                                   &gradients, NULL, &options, &backward) == ATTUNE_OK);
  for (i = 0; i < 2; ++i) {
    CHECK(near(grad_query_data[2 * i], 2 * w0 * w1) && grad_query_data[2 * i + 1] == 0);
    CHECK(near(grad_key_data[2 * i], (i == 0 ? -4 : 4) * w0 * w1) && grad_key_data[2 * i + 1] == 0);
    CHECK(near(grad_value_data[i], 2 * (i == 0 ? w0 : w1)));
  }
  CHECK(grad_query_data[4] == 99 && grad_key_data[4] == 99 && grad_value_data[2] == 99);

  backward.workspace_bytes = bytes - 1;
  CHECK(attune_memory_efficient_attention_backward(&grad_output, &output, &lse, &query, &key, &value,
                                                   &gradients, NULL, &options,
                                                   &backward) == ATTUNE_INVALID_ARGUMENT);
  CHECK(strstr(attune_last_error(), "backward_workspace_bytes() says") != NULL);
  CHECK_REFUSED(attune_memory_efficient_attention_backward(NULL, &output, &lse, &query, &key, &value,
                                                           &gradients, NULL, &options, NULL),
                "grad_output: null tensor");
  gradients.struct_size = 0;
  CHECK_REFUSED(attune_memory_efficient_attention_backward(&grad_output, &output, &lse, &query, &key, &value,
                                                           &gradients, NULL, &options, NULL),
                "gradients: struct_size 0 is not set; start from its INIT macro");
  gradients.struct_size = sizeof gradients;
  CHECK_REFUSED(attune_backward_workspace_bytes(&grad_output, &output, &lse, &query, &key, &value, &gradients,
                                                NULL, &options, NULL, NULL),
                "backward_workspace_bytes: null bytes");

  CHECK(attune_prepare_backward(&grad_output, &output, &lse, &query, &key, &value, &gradients, NULL, &options,
                                NULL) == ATTUNE_OK);
  CHECK(attune_explain_backward(&grad_output, &output, &lse, &query, &key, &value, &gradients, NULL, &options,
                                NULL, &json) == ATTUNE_OK);
  CHECK(json != NULL && strstr(json, "operation=grad_key_value") != NULL);
  attune_free(json);
  CHECK(attune_backward_not_supported_reasons(ATTUNE_FAMILY_CPU, &query, &key, &value, NULL, &options,
                                              &json) == ATTUNE_OK);
  CHECK_TEXT(json, "[]");
  attune_free(json);
}

/* One description, other memory in each run. */
static void test_backward_call(void) {
  const double w1 = exp(1) / (1 + exp(1)), w0 = 1 - w1;
  float grads[] = {1, 1}, grad_lses[] = {0, 0}, added[] = {0, 0};
  float grad_queries[] = {99, 99, 99, 99}, grad_keys[4], grad_values[2], grad_biases[2];
  char workspace_memory[1024 + 256];
  double scale = 1;
  float described[7][4]; /* memory that no run touches */
  attune_tensor grad_output = tensor(described[0], 4, 1, 2, 1, 1);
  attune_tensor grad_lse = tensor(described[1], 3, 1, 1, 2, 0);
  attune_tensor grad_query = tensor(described[2], 4, 1, 2, 1, 2);
  attune_tensor grad_key = tensor(described[3], 4, 1, 2, 1, 2);
  attune_tensor grad_value = tensor(described[4], 4, 1, 2, 1, 1);
  attune_tensor tensor_bias = tensor(described[5], 2, 1, 2, 0, 0);
  attune_tensor grad_bias = tensor(described[6], 2, 1, 2, 0, 0);
  attune_gradients gradients = ATTUNE_GRADIENTS_INIT, values_alone = ATTUNE_GRADIENTS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  attune_backward_options backward = ATTUNE_BACKWARD_OPTIONS_INIT;
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_backward_memory memory = ATTUNE_BACKWARD_MEMORY_INIT;
  attune_backward_call *call = NULL, *plain = NULL;
  size_t bytes = 0;

  memset(described, 0x55, sizeof described);
  options.scale = &scale;
  bias.tensor = &tensor_bias;
  gradients.query = &grad_query;
  gradients.key = &grad_key;
  gradients.value = &grad_value;
  gradients.bias = &grad_bias;
  values_alone.value = &grad_value;
  backward.grad_lse = &grad_lse;
  CHECK(forward(NULL, &options) == ATTUNE_OK);
  CHECK(attune_backward_call_create(&grad_output, &output, &lse, &query, &key, &value, &gradients, &bias,
                                    &options, &backward, &call) == ATTUNE_OK);
  CHECK(attune_backward_call_create(&grad_output, &output, &lse, &query, &key, &value, &values_alone, NULL,
                                    &options, NULL, &plain) == ATTUNE_OK);
  scale = 7; /* the call has its own */
  CHECK(attune_backward_call_workspace_bytes(call, &bytes) == ATTUNE_OK);
  CHECK(bytes > 0 && bytes <= 1024);

  memory.grad_output = grads;
  memory.output = output_data;
  memory.lse = lse_data;
  memory.query = query_data;
  memory.key = key_data;
  memory.value = value_data;
  memory.grad_query = grad_queries;
  memory.grad_key = grad_keys;
  memory.grad_value = grad_values;
  memory.grad_bias = grad_biases;
  memory.bias = added;
  memory.grad_lse = grad_lses;
  memory.workspace = workspace_memory + (256 - (uintptr_t)workspace_memory % 256) % 256;
  memory.workspace_bytes = bytes;
  CHECK(attune_backward_call_run(call, &memory) == ATTUNE_OK);
  CHECK(near(grad_queries[0], 2 * w0 * w1) && near(grad_queries[2], 2 * w0 * w1));
  CHECK(near(grad_keys[0], -4 * w0 * w1) && near(grad_keys[2], 4 * w0 * w1));
  CHECK(near(grad_values[0], 2 * w0) && near(grad_values[1], 2 * w1));
  CHECK(near(grad_biases[0], -4 * w0 * w1) && near(grad_biases[1], 4 * w0 * w1));
  grads[0] = grads[1] = 0;
  grad_lses[0] = 1; /* of the lse the gradients are the weights */
  CHECK(attune_backward_call_run(call, &memory) == ATTUNE_OK);
  CHECK(near(grad_queries[0], w1) && grad_queries[2] == 0);
  CHECK(near(grad_biases[0], w0) && near(grad_biases[1], w1));
  CHECK(grad_values[0] == 0 && grad_values[1] == 0);

  CHECK(described[2][0] == described[6][3] && described[4][0] == described[5][0]);

  /* What a call does not want does not count. */
  grads[0] = grads[1] = 3;
  grad_queries[0] = 99;
  memory.workspace = NULL;
  memory.bias = NULL;
  CHECK(attune_backward_call_run(plain, &memory) == ATTUNE_OK);
  CHECK(near(grad_values[0], 6 * w0) && near(grad_values[1], 6 * w1) && grad_queries[0] == 99);

  /* Each run is checked as any call. */
  CHECK_REFUSED(attune_backward_call_run(call, &memory), "attn_bias: null data pointer");
  memory.lse = NULL;
  CHECK_REFUSED(attune_backward_call_run(plain, &memory), "lse: null data pointer");
  CHECK_REFUSED(attune_backward_call_run(plain, NULL), "backward_call_run: null memory");
  CHECK_REFUSED(attune_backward_call_run(NULL, &memory), "backward_call_run: null call");
  memory.struct_size = 0;
  CHECK_REFUSED(attune_backward_call_run(plain, &memory),
                "backward memory: struct_size 0 is not set; start from its INIT macro");
  CHECK_REFUSED(attune_backward_call_workspace_bytes(NULL, &bytes),
                "backward_call_workspace_bytes: null call");
  CHECK_REFUSED(attune_backward_call_workspace_bytes(plain, NULL),
                "backward_call_workspace_bytes: null bytes");
  attune_backward_call_destroy(plain);
  attune_backward_call_destroy(call);
  attune_backward_call_destroy(NULL);

  plain = NULL;
  CHECK_REFUSED(attune_backward_call_create(NULL, &output, &lse, &query, &key, &value, &gradients, NULL, NULL,
                                            NULL, &plain),
                "grad_output: null tensor");
  CHECK_REFUSED(attune_backward_call_create(&grad_output, &output, &lse, &query, &key, &value, &gradients,
                                            NULL, NULL, NULL, NULL),
                "backward_call_create: null call");
  CHECK(plain == NULL);
}

int main(void) {
  make_tensors();
  CHECK_TEXT(attune_last_error(), "");
  test_names();
  test_refusals();
  test_refused_sequences();
  test_unsupported();
#if ATTUNE_HAVE_LLVM
  test_forward();
  test_forward_call();
  test_bias_tensor();
  test_sequences();
  test_dropout();
  test_merge();
  test_merge_backward();
  test_backward();
  test_backward_call();
  test_prepare_and_explain();
#else
  puts("built without LLVM: no kernel was run");
  (void)test_forward;
  (void)test_forward_call;
  (void)test_bias_tensor;
  (void)test_sequences;
  (void)test_dropout;
  (void)test_merge;
  (void)test_merge_backward;
  (void)test_backward;
  (void)test_backward_call;
  (void)test_prepare_and_explain;
#endif
  if (failures == 0) puts("ok");
  return failures == 0 ? 0 : 1;
}
