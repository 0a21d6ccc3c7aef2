#define PAGEMILL_TARGET scalar
#define PAGEMILL_TARGET_NAME "scalar"
#include "../views.h"
#include "vec_scalar.h"
#include "../generic/target-inl.h"
