#pragma once

#include "problem.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#define RACE_X86 1
#endif

namespace race {

int isa_count();
bool isa_runs(int isa);
bool isa_narrows();  // whether the processor has an instruction from float32 to bfloat16; after isa_runs
const Kernels& isa_kernels(int isa);

}  // namespace race
