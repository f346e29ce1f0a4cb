#pragma once

#include "problem.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#define RACE_X86 1
#endif

namespace race {

int isa_count();
bool isa_runs(int isa);
// The kernels of an instruction set for tokens stored so: AMX has none but for bfloat16, where AVX-512's serve.
const Kernels& isa_kernels(int isa, Store store);

}  // namespace race
