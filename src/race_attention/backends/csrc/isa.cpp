// Which instruction set serves: the widest that this processor has, or the one asked for by name.
#include "isa.hpp"

#if defined(RACE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef RACE_AMX
namespace amx {
extern const Kernels kernels;
}
#endif
#endif

namespace {

constexpr int kAvx2 = 1, kAvx512 = 2, kAmx = 3;

bool avx512_runs() {
#ifdef RACE_X86
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Tiles and bfloat16 products, and the system's leave to use them: Linux gives it to a process that asks.
bool amx_runs() {
#if defined(RACE_AMX) && defined(RACE_TILES_EMULATED)
  return true;
#elif defined(RACE_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!avx512_runs() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTiles = 1u << 24, kTilesOfBFloat16 = 1u << 22, kBFloat16 = 1u << 5;
  if (!(d & kTiles) || !(d & kTilesOfBFloat16) || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kBFloat16)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return given;
#else
  return false;
#endif
}

}  // namespace

int isa_count() {
#if defined(RACE_AMX)
  return 4;
#elif defined(RACE_X86)
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
  if (isa == kAmx) return amx_runs();
#endif
  return false;
}

const Kernels& isa_kernels(int isa, Store store) {
#ifdef RACE_AMX
  if (isa == kAmx && store == kBFloat16) return amx::kernels;
#endif
#ifdef RACE_X86
#ifdef RACE_TILES_EMULATED
  if (isa == kAmx) return avx2::kernels;
#endif
  if (isa == kAvx2) return avx2::kernels;
  if (isa == kAvx512 || isa == kAmx) return avx512::kernels;
#endif
  (void)isa, (void)store;
  return baseline::kernels;
}

}  // namespace race

#define RACE_EXPORT __attribute__((visibility("default")))

extern "C" {

// The name of instruction set `isa`, counted from 0 (the least), or null behind the last.
RACE_EXPORT const char* race_cpu_isa_name(int isa) {
  return isa >= 0 && isa < race::isa_count() ? race::isa_kernels(isa, race::kBFloat16).name : nullptr;
}

RACE_EXPORT int race_cpu_isa_runs(int isa) { return isa >= 0 && isa < race::isa_count() && race::isa_runs(isa); }
}
