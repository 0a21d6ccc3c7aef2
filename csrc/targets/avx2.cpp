#define PAGEMILL_TARGET avx2
#define PAGEMILL_TARGET_NAME "avx2"
#include "../views.h"
#include "vec_avx2.h"
#include "../generic/target-inl.h"
