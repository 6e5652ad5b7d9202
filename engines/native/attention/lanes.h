// Vectors of the level that is being compiled, and the few instructions that the compiler does not
// find by itself. Everything here is internal to its translation unit.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define ATTENTION_FUNCTION inline __attribute__((always_inline))

namespace attention {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
constexpr int kColumns = 4;  // vectors of a row in registers at a time
constexpr int kGroup = 4;
using Narrow = uint8_t;
#else
#if defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kColumns = 2;
// 8-bit numbers in 16 bits: sums of two products of bytes do not fit into the 16 bits that the older
// instruction for bytes has.
constexpr int kGroup = 2;
using Narrow = int16_t;
#endif

// Keys are unsigned where the instruction wants that; `kOffset` was added to them.
constexpr int32_t kOffset = kGroup == 4 ? 128 : 0;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef Narrow Narrows __attribute__((vector_size(kLanes * sizeof(Narrow))));

template <class Vector>
ATTENTION_FUNCTION Vector load(const void* from) {
  Vector values;
  memcpy(&values, from, sizeof values);
  return values;
}
template <class Vector>
ATTENTION_FUNCTION void store(void* to, Vector values) {
  memcpy(to, &values, sizeof values);
}
ATTENTION_FUNCTION Floats all(float value) { return Floats{} + value; }
ATTENTION_FUNCTION Ints all(int32_t value) { return Ints{} + value; }
ATTENTION_FUNCTION Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// 2^x for x from -1e30 to 100, to a relative 4e-6; exact for whole numbers. Below 2^-120 it may be 0.
template <class Vector>
ATTENTION_FUNCTION Vector power_of_fraction(Vector f) {
  return (((f * 0.01355575f + 0.05203237f) * f + 0.24137976f) * f + 0.69303212f) * f + 1.0f;
}

#if defined(__AVX512VNNI__)

ATTENTION_FUNCTION Ints dot(Ints sums, Ints bytes, Ints signed_bytes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)signed_bytes);
}
ATTENTION_FUNCTION Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
ATTENTION_FUNCTION float largest(Floats a) { return _mm512_reduce_max_ps(a); }
ATTENTION_FUNCTION Floats power_of_two(Floats x) {
  const Floats fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(power_of_fraction(fraction), x);
}
ATTENTION_FUNCTION Ints to_ints(Floats values) { return (Ints)_mm512_cvtps_epi32(values); }
ATTENTION_FUNCTION void store_narrow(Narrow* to, Ints values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
}

#else

#if defined(__AVX2__)
ATTENTION_FUNCTION Ints dot(Ints sums, Ints a, Ints b) {
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__)
ATTENTION_FUNCTION Ints dot(Ints sums, Ints a, Ints b) {
  return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
}
#else
ATTENTION_FUNCTION Ints dot(Ints sums, Ints a, Ints b) {  // little-endian: the first is low
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  return sums + (a >> 16) * (b >> 16) +
         ((Ints)((Unsigned)a << 16) >> 16) * ((Ints)((Unsigned)b << 16) >> 16);
}
#endif
ATTENTION_FUNCTION Floats larger(Floats a, Floats b) { return a > b ? a : b; }
ATTENTION_FUNCTION float largest(Floats a) {
  float found = a[0];
  for (int i = 1; i < kLanes; ++i) found = a[i] > found ? a[i] : found;
  return found;
}
// Adding this rounds to a whole number, which is then in the low bits.
constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
ATTENTION_FUNCTION Floats power_of_two(Floats x) {
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  x = larger(x, all(-125.0f));
  const Floats whole = x - 0.5f + kWhole;
  const Floats result = power_of_fraction(x - (whole - kWhole));
  return (Floats)((Unsigned)result + ((Unsigned)whole << 23));
}
ATTENTION_FUNCTION Ints to_ints(Floats values) { return (Ints)(values + kWhole) - 0x4B400000; }
ATTENTION_FUNCTION void store_narrow(Narrow* to, Ints values) {
  store(to, __builtin_convertvector(values, Narrows));
}

#endif

}  // namespace
}  // namespace attention
