/* The C ABI from C: every function, every status that a caller can cause, and the texts of the failures.
 * Compiled as C11: that it compiles is half of the test. */
#include "attune/attune_c.h"
#include "attune/version.h"

#include <math.h>
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

static void test_refusals(void) {
  attune_bias bias = ATTUNE_BIAS_INIT;
  attune_options options = ATTUNE_OPTIONS_INIT;
  attune_counters counters = {sizeof(attune_counters), 0, 0, 0, 0, 0, 0, 0};
  double scale = NAN;
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
  CHECK_REFUSED(forward(NULL, NULL), "value: rank 1000, expected [B, M, H, K] or [B, M, K]");
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
  bias.kind = 77;
  CHECK_REFUSED(forward(&bias, NULL), "bias: unknown kind 77");
  bias.kind = ATTUNE_BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT_LOCAL;
  CHECK_REFUSED(
      forward(&bias, NULL),
      "LowerTriangularFromBottomRightLocalAttentionMask: window_size 0, expected `window_size > 0`");
  bias.kind = ATTUNE_BIAS_LOCAL_FROM_BOTTOM_RIGHT;
  bias.window_left = -1;
  CHECK_REFUSED(forward(&bias, NULL),
                "LocalAttentionFromBottomRightMask: window_left -1 and window_right 0, expected both >= 0");

  options.struct_size = 0;
  CHECK_REFUSED(forward(NULL, &options), "options: struct_size 0 is not set; start from its INIT macro");
  options.struct_size = sizeof options;
  options.family = 12;
  CHECK_REFUSED(forward(NULL, &options), "options: unknown family 12");
  options.family = ATTUNE_AUTOMATIC;
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

static void test_unsupported(void) {
  attune_options options = ATTUNE_OPTIONS_INIT;
  options.family = ATTUNE_FAMILY_MMA;
  CHECK(forward(NULL, &options) == ATTUNE_UNSUPPORTED);
  CHECK(strstr(attune_last_error(), "the call forces mma") != NULL);
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

  bias.kind = ATTUNE_BIAS_LOWER_TRIANGULAR;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], both));
  bias.kind = ATTUNE_BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], both));
  bias.kind = ATTUNE_BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT_LOCAL;
  bias.window_size = 1;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], 2) && near(output_data[1], 4));
  bias.kind = ATTUNE_BIAS_LOCAL_FROM_BOTTOM_RIGHT;
  bias.window_right = 1;
  CHECK(forward(&bias, &options) == ATTUNE_OK);
  CHECK(near(output_data[0], both) && near(output_data[1], 4));

  /* The default scale, and neither lse nor bias nor options. */
  CHECK(attune_memory_efficient_attention_forward(&query, &key, &value, &output, NULL, NULL, NULL) ==
        ATTUNE_OK);
  CHECK(near(output_data[0], (2 + 4 * exp(sqrt(0.5))) / (1 + exp(sqrt(0.5)))));
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

int main(void) {
  make_tensors();
  CHECK_TEXT(attune_last_error(), "");
  test_names();
  test_refusals();
  test_unsupported();
#if ATTUNE_HAVE_LLVM
  test_forward();
  test_prepare_and_explain();
#else
  puts("built without LLVM: no kernel was run");
  (void)test_forward;
  (void)test_prepare_and_explain;
#endif
  if (failures == 0) puts("ok");
  return failures == 0 ? 0 : 1;
}
