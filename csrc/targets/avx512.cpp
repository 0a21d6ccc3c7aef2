#define PAGEMILL_TARGET avx512
#define PAGEMILL_TARGET_NAME "avx512"
#include "../views.h"
#include "vec_avx512.h"
#include "../generic/target-inl.h"
