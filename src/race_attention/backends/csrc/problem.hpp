// What one call is: the arguments of the C interface, and what the driver derives from them.
//
// Shape letters are those of race_attention/backends/call.py: B batch, Tq and Tk tokens, H query heads, G key
// heads, n = H / G, D and Dv sizes, L tables, P planes, R = 2^P buckets a table, S = L * R.
//
// This header is compiled once for each instruction set. It holds plain data only: an inline function here could be
// compiled with instructions that another processor lacks, and the linker would keep any one of the copies.
#pragma once

#include <cstddef>
#include <cstdint>

namespace race {

using i64 = std::int64_t;

enum Store : i64 { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

// The C interface: every field is a 64-bit integer, a pointer among them. Strides count elements. A pointer of 0
// means that the argument is not given, or the result not wanted. backends/cpu.py packs the same fields in the same
// order; `fields` guards against a library of another version.
struct Tokens {  // [batch, token, head, dim]
  void* data;
  i64 b, t, h, d;
};

struct State {  // mass [row, g, l, r] and value_sum [row, g, l, r, dv], float64
  const double* mass;
  i64 mass_stride[4];
  const double* value_sum;
  i64 value_sum_stride[5];
};

struct Args {
  i64 fields;  // 8-byte fields of this structure
  i64 store, threads, isa;
  i64 batch, tq, tk, heads, groups, dim, value_dim, tables, planes, rows, causal, run;
  Tokens q, k, v;
  const void* planes_data;  // [G, L, P, D] float32, or float64 for float64 tokens
  i64 planes_stride[4];
  const void* beta;  // [G], likewise
  i64 beta_stride;
  const void* log_decay;  // [B, Tk, G], likewise
  i64 log_decay_stride[3];
  const unsigned char* mask;  // [B, Tk, G]
  i64 mask_stride[3];
  const i64* cu_seqlens;  // [rows + 1], contiguous
  const i64* cu_seqlens_key;
  State initial;
  Tokens out;
  double* final_mass;  // contiguous
  double* final_value_sum;
  void* saved;  // [total tokens / run, G, S, Dv + 1] in the arithmetic's dtype: states between the runs of a row
  // backward
  Tokens grad_out;
  State grad_final;
  Tokens dq, dk, dv;
  void* dplanes;  // contiguous [G, L, P, D]
  void* dbeta;    // [G]
  void* dlog_decay;  // contiguous [B, Tk, G]
  double* dinitial_mass;  // contiguous
  double* dinitial_value_sum;
  // PyGILState_Ensure, PyGILState_Release, PyErr_CheckSignals, PyErr_Clear: how a long call learns of an interrupt.
  int (*gil_ensure)();
  void (*gil_release)(int);
  int (*check_signals)();
  void (*clear_error)();
};

struct Row {
  i64 batch, q0, qlen, k0, klen;
  i64 saved;  // index of its first saved state
};

// Tokens [begin, end) of a row, counted from its start; begin is a multiple of Args::run.
struct Piece {
  i64 row, begin, end;
  i64 first, last;  // whether it starts or ends its row
  i64 slot;         // pieces of one slot share the place of their sums over tokens
};

struct Problem {
  const Args* a;
  i64 heads_a_group, buckets, states, projections;  // n, R, S, L * P
  const Row* rows;
  i64 slots;
  i64 lanes;                  // key heads that one thread passes over together, at most
  i64 large;                  // whether results are too large for the caches
  i64 threads;
  i64 bfloat16;               // whether the processor narrows to bfloat16 by itself
  void* relay;                // in a relay, what its threads share: see relay.hpp
  const void* packed_planes;  // [G][L * P][padded D], and once more in another order
  void* inverse;              // [B * Tq * H][3]: 1 / denominator, its adjoint, lift; from queries to keys
  double* partial;            // [G][slots][2][L * P * D + 1]: gradients of hyperplanes and of beta
  const int* stop;            // set when the call is interrupted
};

// Passes over the pieces of some key heads. A state given or left is [S][Dv + 1] float64, mass last.
enum Pass : int {
  kForward,             // causal: outputs, states
  kAccumulate,          // causal: what the last piece leaves
  kBackward,            // causal: the next three in one, row by row
  kBackwardQuery,       // the gradients of queries, and `inverse`
  kBackwardAccumulate,  // what the first piece leaves to earlier ones
  kBackwardKey,         // the gradients of keys, values, log_decay and initial state
  kScan,                // from what each slot leaves to what each slot is given
  kBackwardScan,
  kRelay,               // causal: as kForward and kBackward, but the runs of a row are spread over threads
  kRelayBackward,
  kFullRows,            // not causal: whole rows, forward
  kFullRowsBackward,
  kFullAccumulate,      // not causal, rows in pieces: the state of keys
  kFullReadout,
  kFullBackwardQuery,   // leaves the adjoint of the state
  kFullBackwardKey,
  kFullReduce,          // the state of a row from those of its pieces
  kFullReduceAdjoint,
};

struct Work {
  int pass;
  i64 g, heads;  // key heads [g, g + heads)
  const Piece *begin, *end;
  // Of head g; those of the heads behind it lie `slots` states further each.
  const double* given;  // the state before the first piece (after the last, backward) where its row goes on there;
                        // in a scan or reduction, what each slot left
  double* left;         // the state left
  double* left_factor;  // what is left of the state before it
};

struct Kernels {
  const char* name;
  std::size_t (*scratch_bytes)(const Problem&);
  std::size_t (*packed_bytes)(const Problem&);
  void (*pack)(const Problem&, void*);
  std::size_t (*relay_bytes)(const Problem&);
  void (*begin_relay)(const Problem&, void*);
  void (*work)(const Problem&, const Work&, void* scratch);
};

}  // namespace race
