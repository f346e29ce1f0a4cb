// Starts the kernels of a recorded pass in one call: batch.py writes the program, once for a layout.
//
// The driver's functions come as addresses, so that neither CUDA's headers nor its libraries are needed to build this.
#include <cstdint>

namespace {

// cuda.h: CUresult cuLaunchKernel(CUfunction, grid, block, sharedMemBytes, CUstream, void** params, void** extra)
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
// CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream)
using Clear = int (*)(std::uint64_t, unsigned char, std::size_t, void*);

constexpr int kMost = 128;  // parameters of a kernel; batch.py has the same number
constexpr int kSpare = 4;   // Triton adds pointers to scratch memory behind them, null here

// A number, or a place: the address of a buffer and how far behind it.
std::int64_t value_of(const std::int64_t* pair, const std::int64_t* addresses) {
  return pair[0] < 0 ? pair[1] : addresses[pair[0]] + pair[1];
}

}  // namespace

// program: {address of cuLaunchKernel, address of cuMemsetD8Async, steps}, then for each step
//   {parameters, function, grid (3), threads, bytes of shared memory}, then a pair for each parameter: {buffer, offset},
//     or {-1, value}, its lowest bytes as the kernel takes them;
//   or {-1, buffer, offset, bytes} for zeros.
// addresses: of the buffers. Returns the driver's status, 0 where all were started. Writes to neither, so that several
// threads may run one program.
extern "C" __attribute__((visibility("default"))) int race_launch(const std::int64_t* program,
                                                                  const std::int64_t* addresses, void* stream) {
  const auto launch = reinterpret_cast<Launch>(program[0]);
  const auto clear = reinterpret_cast<Clear>(program[1]);
  const std::int64_t* step = program + 3;
  std::int64_t values[kMost + kSpare];
  void* parameters[kMost + kSpare];
  for (int i = 0; i < kMost + kSpare; ++i) parameters[i] = &values[i];
  for (std::int64_t left = program[2]; left > 0; --left) {
    const std::int64_t count = step[0];
    int status;
    if (count < 0) {
      status = clear(static_cast<std::uint64_t>(value_of(step + 1, addresses)), 0, static_cast<std::size_t>(step[3]), stream);
      step += 4;
    } else {
      const std::int64_t* pair = step + 7;
      for (std::int64_t i = 0; i < count; ++i, pair += 2) values[i] = value_of(pair, addresses);
      for (int i = 0; i < kSpare; ++i) values[count + i] = 0;
      status = launch(reinterpret_cast<void*>(step[1]), static_cast<unsigned>(step[2]), static_cast<unsigned>(step[3]),
                      static_cast<unsigned>(step[4]), static_cast<unsigned>(step[5]), 1, 1, static_cast<unsigned>(step[6]),
                      stream, parameters, nullptr);
      step = pair;
    }
    if (status != 0) return status;
  }
  return 0;
}
