#define RACE_NAMESPACE amx
#define RACE_BYTES 64
#define RACE_NAME "amx"
#define RACE_TILES 1
#include "kernels.hpp"
