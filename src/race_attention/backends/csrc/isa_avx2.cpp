#define RACE_NAMESPACE avx2
#define RACE_BYTES 32
#define RACE_NAME "avx2"
#include "kernels.hpp"
