// Rows of a contiguous matrix in the registers of a block, 16 bytes an access, and sums over them.
//
// One thread holds kNumbers numbers of a row, as they are stored: groups of kStep neighbours, of
// which every blockDim.x-th is its own. What lies beyond the row is 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef __CUDACC__
#include "emulation.h"
#endif

namespace fastalign {
namespace cuda {

constexpr int kNumbers = 16;
constexpr int kMaxThreads = 1024;

template <class To, class From>
__device__ inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// The numbers of a word of 32 bits.
template <class T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kCount = 1;
  __device__ static float get(uint32_t word, int) { return bits<float>(word); }
  __device__ static uint32_t make(const float* x) { return bits<uint32_t>(x[0]); }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kCount = 2;
  __device__ static float get(uint32_t word, int i) { return bits<float>(i ? word & 0xffff0000u : word << 16); }
  __device__ static uint32_t make(const float* x) { return bits<uint32_t>(__floats2bfloat162_rn(x[0], x[1])); }
};

template <>
struct Word<__half> {
  static constexpr int kCount = 2;
  __device__ static float get(uint32_t word, int i) {
    const float2 x = __half22float2(bits<__half2>(word));
    return i ? x.y : x.x;
  }
  __device__ static uint32_t make(const float* x) { return bits<uint32_t>(__floats2half2_rn(x[0], x[1])); }
};

template <class T>
constexpr int kPacket = 16 / sizeof(T);  // numbers of one access

// Neighbours that a thread takes: a packet of the narrower type.
template <class A, class B>
constexpr int kStepOf = kPacket<A> > kPacket<B> ? kPacket<A> : kPacket<B>;

// One thread's numbers of a row. `kAligned` where all rows begin at multiples of 16 bytes.
template <class T, int kStep, bool kAligned>
struct Part {
  static constexpr int kWords = kPacket<T> / Word<T>::kCount;  // of a packet: 4
  uint32_t words[kNumbers / Word<T>::kCount];

  __device__ static int column(int i) {
    return (i / kStep * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kStep + i % kStep;
  }

  __device__ float operator[](int i) const { return Word<T>::get(words[i / Word<T>::kCount], i % Word<T>::kCount); }

  // Only the words stay in registers until the next use, not the floats that were made of them.
  __device__ void keep_words() {
#ifdef __CUDACC__
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
#endif
  }

  __device__ void load(const T* row, int d) {
#pragma unroll
    for (int i = 0; i < kNumbers; i += kPacket<T>) {
      const int first = column(i);
      uint4 packet = {0u, 0u, 0u, 0u};
      if (kAligned) {
        if (first < d) packet = *reinterpret_cast<const uint4*>(row + first);
      } else {
        T numbers[kPacket<T>];
#pragma unroll
        for (int j = 0; j < kPacket<T>; j++) numbers[j] = first + j < d ? row[first + j] : T(0.0f);
        memcpy(&packet, numbers, 16);
      }
      uint32_t* to = words + i / Word<T>::kCount;
      to[0] = packet.x, to[1] = packet.y, to[2] = packet.z, to[3] = packet.w;
    }
  }
};

// Writes what a thread computed of a row.
template <class T, int kStep, bool kAligned>
__device__ inline void store(T* row, int d, const float (&x)[kNumbers]) {
#pragma unroll
  for (int i = 0; i < kNumbers; i += kPacket<T>) {
    const int first = Part<T, kStep, kAligned>::column(i);
    if (first >= d) continue;
    uint4 packet;
    packet.x = Word<T>::make(x + i);
    packet.y = Word<T>::make(x + i + Word<T>::kCount);
    packet.z = Word<T>::make(x + i + 2 * Word<T>::kCount);
    packet.w = Word<T>::make(x + i + 3 * Word<T>::kCount);
    if (kAligned) {
      *reinterpret_cast<uint4*>(row + first) = packet;
    } else {
      T numbers[kPacket<T>];
      memcpy(numbers, &packet, 16);
#pragma unroll
      for (int j = 0; j < kPacket<T>; j++)
        if (first + j < d) row[first + j] = numbers[j];
    }
  }
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Largest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }  // not NaN, if one is
};

// `values` of all threads joined, the same in each of them; in one order, whatever the rows.
template <class Join, int kCount>
__device__ inline void over_block(float (&values)[kCount]) {
  __shared__ float parts[kCount][kMaxThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Join join;
#pragma unroll
  for (int k = 0; k < kCount; k++)
#pragma unroll
    for (int offset = 16; offset; offset /= 2) values[k] = join(values[k], __shfl_xor_sync(~0u, values[k], offset));
  if (warps == 1) return;
#pragma unroll
  for (int k = 0; k < kCount; k++)
    if (lane == 0) parts[k][warp] = values[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; k++) {
    values[k] = lane < warps ? parts[k][lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) values[k] = join(values[k], __shfl_xor_sync(~0u, values[k], offset));
  }
  __syncthreads();  // the next call writes `parts`
}

// Of the squares of a row: no square that counts has left the range of a float.
__device__ inline bool is_plain(float squares) { return squares > 1e-20f && squares < 1e37f; }

// The power of two below the largest magnitude: multiplying by it, or by its inverse, is exact.
__device__ inline float power_below(float largest) {
  return bits<float>(bits<uint32_t>(fmaxf(largest, 1e-30f)) & 0x7f800000u);
}

inline int threads_of(int64_t d) {
  const int64_t threads = (d + 32 * kNumbers - 1) / (32 * kNumbers) * 32;
  return static_cast<int>(threads < 32 ? 32 : threads);
}

inline unsigned blocks_of(int64_t rows) { return static_cast<unsigned>(rows < 0x7fffffff ? rows : 0x7fffffff); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, int threads, void* stream, Arguments... arguments) {
#ifdef __CUDACC__
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("the kernel was not launched: ") + cudaGetErrorString(error));
#else
  emulate(blocks, threads, [=] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

}  // namespace cuda
}  // namespace fastalign
