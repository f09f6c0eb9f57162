// The kernels on the CPU, for tests where no GPU is: a block's threads are fibers of one CPU thread.
//
// A warp runs alone to the next barrier of its block, its threads in turn between shuffles, then the
// next warp does; in the order of their numbers or in reverse. What is read too early, or written too
// early for a warp that is behind, so gives another result. Threads that do not all arrive at the same
// shuffle or barrier end the process.
#pragma once

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // one CPU thread runs one block at a time

namespace fastalign {
namespace cuda {

struct Index {
  unsigned x;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

class Emulation {
 public:
  enum At { kBarrier, kShuffle, kEnd };

  static Emulation& one() {
    static Emulation it;
    return it;
  }

  bool reversed = false;
  float shuffled[1024];

  void run(unsigned blocks, int threads, const std::function<void()>& body) {
    gridDim.x = blocks, blockDim.x = static_cast<unsigned>(threads), body_ = &body;
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) do {
        for (int i = 0; i < threads / 32; i++) run_warp(reversed ? threads / 32 - 1 - i : i);
        for (int i = 1; i < threads; i++)
          if (fibers_[i]->at != fibers_[0]->at) die("not all threads of a block wait at its barrier");
      } while (fibers_[0]->at != kEnd);
  }

  // Called by a thread of the kernel: the others go on until they are here, too.
  void wait(At at) {
    Fiber& own = *fibers_[threadIdx.x];
    own.at = at;
    leave(&own.sanitized);
    if (!_setjmp(own.place)) _longjmp(scheduler_, 1);  // much faster than swapcontext
    arrive(own.sanitized);
  }

 private:
  struct Fiber {
    static constexpr size_t kStack = 1 << 16;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false;
    At at = kEnd;
    jmp_buf place;
    void* sanitized = nullptr;
  };

  static void die(const char* why) {
    std::fprintf(stderr, "emulation: %s\n", why);
    std::abort();
  }

  // To the next barrier of the block, or the end; other warps stand still meanwhile.
  void run_warp(int warp) {
    const int first = warp * 32;
    do {
      for (int i = 0; i < 32; i++) resume(first + (reversed ? 31 - i : i));
      for (int i = 1; i < 32; i++)
        if (fibers_[first + i]->at != fibers_[first]->at) die("not all threads of a warp wait at a shuffle");
    } while (fibers_[first]->at == kShuffle);
  }

  // A fiber lives on, for the same thread of the blocks to come.
  static void live() {
    one().arrive(nullptr);
    for (;;) {
      (*one().body_)();
      one().wait(kEnd);
    }
  }

  void resume(int i) {
    threadIdx.x = static_cast<unsigned>(i);
    Fiber& fiber = *fibers_[i];
#ifdef __SANITIZE_ADDRESS__
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), Fiber::kStack);
#endif
    if (!_setjmp(scheduler_)) {
      if (fiber.started) _longjmp(fiber.place, 1);
      fiber.started = true;
      ucontext_t start;
      getcontext(&start);
      start.uc_stack.ss_sp = fiber.stack.get();
      start.uc_stack.ss_size = Fiber::kStack;
      makecontext(&start, &Emulation::live, 0);
      setcontext(&start);
    }
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  // A fiber's side of the switch to the scheduler, of whose stack the sanitizer told it.
  void leave([[maybe_unused]] void** own) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(own, bottom_, size_);
#endif
  }

  void arrive([[maybe_unused]] void* own) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own, &bottom_, &size_);
#endif
  }

  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* body_ = nullptr;
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] size_t size_ = 0;
};

inline void emulate(unsigned blocks, int threads, const std::function<void()>& body) {
  Emulation::one().run(blocks, threads, body);
}

inline void __syncthreads() { Emulation::one().wait(Emulation::kBarrier); }

inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  Emulation& it = Emulation::one();
  const unsigned own = threadIdx.x;
  it.shuffled[own] = x;
  it.wait(Emulation::kShuffle);
  const float other = it.shuffled[own ^ static_cast<unsigned>(lanes)];
  it.wait(Emulation::kShuffle);
  return other;
}

inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }

}  // namespace cuda
}  // namespace fastalign
