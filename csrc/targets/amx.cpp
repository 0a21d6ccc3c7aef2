#define PAGEMILL_TARGET amx
#define PAGEMILL_TARGET_NAME "amx"
#define PAGEMILL_BF16 1
#define PAGEMILL_AMX 1
#include "../views.h"
#include "vec_avx512.h"
#include "../generic/target-inl.h"
