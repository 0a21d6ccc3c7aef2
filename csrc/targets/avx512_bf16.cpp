#define PAGEMILL_TARGET avx512_bf16
#define PAGEMILL_TARGET_NAME "avx512_bf16"
#define PAGEMILL_BF16 1
#include "../views.h"
#include "vec_avx512.h"
#include "../generic/target-inl.h"
