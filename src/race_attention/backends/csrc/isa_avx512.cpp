#define RACE_NAMESPACE avx512
#define RACE_BYTES 64
#define RACE_NAME "avx512"
#include "kernels.hpp"
