#define RACE_NAMESPACE baseline
#define RACE_BYTES 16
#define RACE_NAME "baseline"
#include "kernels.hpp"
