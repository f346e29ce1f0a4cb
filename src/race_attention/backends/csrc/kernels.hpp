// The table of entry points of one instruction set. Included once by each isa_*.cpp, which sets
// RACE_NAMESPACE, RACE_BYTES (of a vector) and RACE_NAME.
#pragma once

#include "full.hpp"
#include "relay.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
std::size_t scratch_of(const Problem& p) {
  Cutter count(nullptr);
  Room<T> room(p, count);
  return count.used();
}

// Hyperplanes as rows of padded length; behind all of them once more, as bfloat16 tokens are multiplied with them.
template <class T>
void pack_of(const Problem& p, T* to) {
  const Args& a = *p.a;
  const T* from = static_cast<const T*>(a.planes_data);
  const i64* s = a.planes_stride;
  const i64 padded = sizes<T>(p).dim, all = a.groups * p.projections * padded;
  for (i64 g = 0; g < a.groups; ++g)
    for (i64 l = 0; l < a.tables; ++l)
      for (i64 k = 0; k < a.planes; ++k, to += padded)
        for (i64 d = 0; d < padded; ++d) to[d] = d < a.dim ? from[g * s[0] + l * s[1] + k * s[2] + d * s[3]] : T(0);
  if (a.store != kBFloat16 || padded % (2 * W<T>) != 0) return;
  split_rows<T>(to, to - all, all);
}

template <class T>
void work_of(const Problem& p, const Work& work, void* scratch) {
  if (work.pass < kRelay) {
    Causal<T> pass(p, work, scratch);
    switch (work.pass) {
      case kForward: return pass.forward(false);
      case kAccumulate: return pass.forward(true);
      case kBackward: return pass.backward();
      case kBackwardQuery: return pass.backward_query();
      case kBackwardAccumulate: return pass.backward_accumulate();
      case kBackwardKey: return pass.backward_key();
      case kScan: return pass.scan();
      default: return pass.backward_scan();
    }
  }
  if (work.pass < kFullRows) {
    Relay<T> pass(p, work, scratch);
    return work.pass == kRelay ? pass.forward() : pass.backward();
  }
  Full<T> pass(p, work, scratch);
  switch (work.pass) {
    case kFullRows: return pass.rows_forward();
    case kFullRowsBackward: return pass.rows_backward();
    case kFullAccumulate: return pass.accumulate();
    case kFullReadout: return pass.readout();
    case kFullBackwardQuery: return pass.backward_query();
    case kFullBackwardKey: return pass.backward_key();
    case kFullReduce: return pass.reduce();
    default: return pass.reduce_adjoint();
  }
}

template <class T>
std::size_t relay_bytes_of(const Problem& p) {
  Cutter count(nullptr);
  lay_baton<T>(p, count);
  return count.used();
}
template <class T>
void begin_relay_of(const Problem& p, void* memory) {
  Cutter cut(memory);
  lay_baton<T>(p, cut);
}

bool wide(const Problem& p) { return p.a->store == kFloat64; }
std::size_t scratch_bytes(const Problem& p) { return wide(p) ? scratch_of<double>(p) : scratch_of<float>(p); }
std::size_t packed_bytes(const Problem& p) {
  const std::size_t rows = static_cast<std::size_t>(p.a->groups * p.projections * 2);
  return wide(p) ? rows * static_cast<std::size_t>(sizes<double>(p).dim) * sizeof(double)
                 : rows * static_cast<std::size_t>(sizes<float>(p).dim) * sizeof(float);
}
void pack(const Problem& p, void* to) {
  wide(p) ? pack_of<double>(p, static_cast<double*>(to)) : pack_of<float>(p, static_cast<float*>(to));
}
std::size_t relay_bytes(const Problem& p) { return wide(p) ? relay_bytes_of<double>(p) : relay_bytes_of<float>(p); }
void begin_relay(const Problem& p, void* memory) {
  wide(p) ? begin_relay_of<double>(p, memory) : begin_relay_of<float>(p, memory);
}
void work(const Problem& p, const Work& w, void* scratch) {
  wide(p) ? work_of<double>(p, w, scratch) : work_of<float>(p, w, scratch);
  finish_streams();
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {RACE_NAME, scratch_bytes, packed_bytes, pack, relay_bytes, begin_relay, work};

}  // namespace RACE_NAMESPACE
}  // namespace race
