/* Norms, gates, rotary embedding and softmax, forward and backward, in float32 and bfloat16; sums are taken in float32. */

#include "../vectors.h"

#define T float
#define LOAD load_float
#define STORE store_float
#define ONE(x) (x)
#define BACK(x) (x)
#define NAME(base) base##float32
#include "rows_of.h"
#undef T
#undef LOAD
#undef STORE
#undef ONE
#undef BACK
#undef NAME

#define T bf16
#define LOAD load_bf16
#define STORE store_bf16
#define ONE to_float
#define BACK to_bf16
#define NAME(base) base##bfloat16
#include "rows_of.h"

/* Changes whenever a signature does. */
EXPORT int64_t isft_training_version(void) { return 1; }
