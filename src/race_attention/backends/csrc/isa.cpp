// Which instruction set serves: the widest that this processor has, or the one asked for by name.
#include "isa.hpp"

namespace race {

namespace baseline {
extern const Kernels kernels;
}
#ifdef RACE_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef RACE_X86
constexpr int kAvx2 = 1, kAvx512 = 2;

bool avx512_runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

int isa_count() {
#if defined(RACE_X86)
  return 3;
#else
  return 1;
#endif
}

bool isa_runs(int isa) {
  if (isa == 0) return true;
#ifdef RACE_X86
  __builtin_cpu_init();  // also asks whether the system saves the wide registers
  if (isa == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == kAvx512) return avx512_runs();
#endif
  return false;
}

bool isa_narrows() {
#ifdef RACE_X86
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

const Kernels& isa_kernels(int isa) {
#ifdef RACE_X86
  if (isa == kAvx2) return avx2::kernels;
  if (isa == kAvx512) return avx512::kernels;
#endif
  (void)isa;
  return baseline::kernels;
}

}  // namespace race

#define RACE_EXPORT __attribute__((visibility("default")))

extern "C" {

// The name of instruction set `isa`, counted from 0 (the least), or null behind the last.
RACE_EXPORT const char* race_cpu_isa_name(int isa) {
  return isa >= 0 && isa < race::isa_count() ? race::isa_kernels(isa).name : nullptr;
}

RACE_EXPORT int race_cpu_isa_runs(int isa) { return isa >= 0 && isa < race::isa_count() && race::isa_runs(isa); }
}
