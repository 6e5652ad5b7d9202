// Vectors of the level that is being compiled, and the few instructions that the compiler does not
// find by itself. Everything here is internal to its translation unit.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINED inline __attribute__((always_inline))

// A name with the level that is being compiled behind it.
#define OPERATORS_JOIN(name, level) name##_##level
#define OPERATORS_JOINED(name, level) OPERATORS_JOIN(name, level)
#define OF_THIS_LEVEL(name) OPERATORS_JOINED(name, OPERATORS_LEVEL)

namespace operators {
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
INLINED Vector load(const void* from) {
  Vector values;
  memcpy(&values, from, sizeof values);
  return values;
}
template <class Vector>
INLINED void store(void* to, Vector values) {
  memcpy(to, &values, sizeof values);
}
INLINED Floats all(float value) { return Floats{} + value; }
INLINED Ints all(int32_t value) { return Ints{} + value; }
INLINED Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// As many vectors of a product's row as its sums find room in registers for.
#if defined(__AVX512VNNI__) || defined(__aarch64__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

constexpr float kLog2E = 1.442695041f;
constexpr float kNone = -3.0e38f;  // a score below all others

// 2^x for x from -1e30 to 100, to a relative 4e-6; exact for whole numbers. Below 2^-120 it may be 0.
template <class Vector>
INLINED Vector power_of_fraction(Vector f) {
  return (((f * 0.01355575f + 0.05203237f) * f + 0.24137976f) * f + 0.69303212f) * f + 1.0f;
}

#if defined(__AVX512VNNI__)

INLINED Ints dot(Ints sums, Ints bytes, Ints signed_bytes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)signed_bytes);
}
INLINED Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINED float largest(Floats a) { return _mm512_reduce_max_ps(a); }
INLINED Floats power_of_two(Floats x) {
  const Floats fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(power_of_fraction(fraction), x);
}
INLINED Ints to_ints(Floats values) { return (Ints)_mm512_cvtps_epi32(values); }
INLINED void store_narrow(Narrow* to, Ints values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
}

#else

#if defined(__AVX2__)
INLINED Ints dot(Ints sums, Ints a, Ints b) {
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__)
INLINED Ints dot(Ints sums, Ints a, Ints b) {
  return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
}
#else
INLINED Ints dot(Ints sums, Ints a, Ints b) {  // little-endian: the first is low
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  return sums + (a >> 16) * (b >> 16) +
         ((Ints)((Unsigned)a << 16) >> 16) * ((Ints)((Unsigned)b << 16) >> 16);
}
#endif
INLINED Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINED float largest(Floats a) {
  float found = a[0];
  for (int i = 1; i < kLanes; ++i) found = a[i] > found ? a[i] : found;
  return found;
}
// Adding this rounds to a whole number, which is then in the low bits.
constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
INLINED Floats power_of_two(Floats x) {
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  x = larger(x, all(-125.0f));
  const Floats whole = x - 0.5f + kWhole;
  const Floats result = power_of_fraction(x - (whole - kWhole));
  return (Floats)((Unsigned)result + ((Unsigned)whole << 23));
}
INLINED Ints to_ints(Floats values) { return (Ints)(values + kWhole) - 0x4B400000; }
INLINED void store_narrow(Narrow* to, Ints values) {
  store(to, __builtin_convertvector(values, Narrows));
}

#endif

// 2^x to fp32's own rounding, for x up to 100; NaN stays what it is. Below 2^-125 it may be 0.
INLINED Floats exponential(Floats x) {
#if defined(__AVX512VNNI__)
  x = _mm512_max_ps(all(-200.0f), x);  // the second one, if it is NaN
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  x = x < -125.0f ? all(-125.0f) : x;
  const Floats shifted = x + kWhole, whole = shifted - kWhole;
#endif
  const Floats f = x - whole;
  Floats power = all(0.000153533615f) * f + 0.0013398875f;
  power = power * f + 0.00961843736f;
  power = power * f + 0.0555033247f;
  power = power * f + 0.240226479f;
  power = power * f + 0.693147203f;
  power = power * f + 1.0f;
#if defined(__AVX512VNNI__)
  return _mm512_scalef_ps(power, whole);
#else
  return (Floats)((Unsigned)power + ((Unsigned)shifted << 23)) + (x - x);
#endif
}

// x times the normal distribution's share below x, by a polynomial for the logarithm of the tail's
// share: within 1e-7 of the exact function.
INLINED Floats gelu(Floats x) {
  Floats far = x < 0.0f ? -x : x;
  far = far > 8.0f ? all(8.0f) : far;
  Floats power = all(-9.25269266e-09f) * far + 3.28194058e-07f;
  power = power * far - 4.9047611e-06f;
  power = power * far + 3.84566769e-05f;
  power = power * far - 0.000137188409f;
  power = power * far - 0.00032689448f;
  power = power * far + 0.00739801389f;
  power = power * far - 0.052794569f;
  power = power * far - 0.459081894f;
  power = power * far - 1.15112516f;
  power = power * far - 0.999999485f;
  const Floats tail = x * exponential(power);
  return x < 0.0f ? tail : x - tail;
}

typedef float Four __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourPlaces{i, j, k, l})
#endif

// Rows to columns.
INLINED void turn_four(Four (&rows)[4]) {
  const Four a = SHUFFLE(rows[0], rows[1], 0, 4, 1, 5), b = SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Four c = SHUFFLE(rows[0], rows[1], 2, 6, 3, 7), d = SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = SHUFFLE(a, b, 0, 1, 4, 5);
  rows[1] = SHUFFLE(a, b, 2, 3, 6, 7);
  rows[2] = SHUFFLE(c, d, 0, 1, 4, 5);
  rows[3] = SHUFFLE(c, d, 2, 3, 6, 7);
}

}  // namespace
}  // namespace operators
