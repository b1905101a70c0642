#include <attune/attune_c.h>

#include <stdio.h>

static attune_tensor scalar(float* data) {
  attune_tensor tensor = {data, ATTUNE_F32, ATTUNE_CPU, 0, 4, {1, 1, 1, 1}, {1, 1, 1, 1}};
  return tensor;
}

int main(void) {
  float one = 1, three = 3, result = 0;
  const attune_tensor query = scalar(&one), value = scalar(&three), output = scalar(&result);
  if (attune_memory_efficient_attention_forward(&query, &query, &value, &output, NULL, NULL, NULL) !=
      ATTUNE_OK) {
    fprintf(stderr, "%s\n", attune_last_error());
    return 1;
  }
  printf("output %g\n", result);
  return 0;
}
