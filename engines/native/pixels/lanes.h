// Vectors of floats where the compiler does not find the best instruction by itself: permutation
// within registers, conversion of fp16, stores past the caches. PIXELS_LANES is 0 where there are none.
#pragma once

#include "core.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#define PIXELS_LANES 1
#include <immintrin.h>
#else
#define PIXELS_LANES 0
#endif

namespace pixels {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
using Floats = __m512;

PIXELS_FUNCTION Floats load(const float* from) { return _mm512_loadu_ps(from); }
PIXELS_FUNCTION void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
PIXELS_FUNCTION void stream(float* to, Floats values) { _mm512_stream_ps(to, values); }
// values[places[i] - first] for each lane, places within kLanes of `first`
PIXELS_FUNCTION Floats pick(Floats values, const int32_t* places, int32_t first) {
  const __m512i lanes = _mm512_sub_epi32(_mm512_loadu_si512(places), _mm512_set1_epi32(first));
  return _mm512_permutexvar_ps(lanes, values);
}
PIXELS_FUNCTION Floats load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
PIXELS_FUNCTION void store_halves(uint16_t* to, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PIXELS_FUNCTION void stream_halves(uint16_t* to, Floats values) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif PIXELS_LANES

constexpr int64_t kLanes = 8;
using Floats = __m256;

PIXELS_FUNCTION Floats load(const float* from) { return _mm256_loadu_ps(from); }
PIXELS_FUNCTION void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
PIXELS_FUNCTION void stream(float* to, Floats values) { _mm256_stream_ps(to, values); }
PIXELS_FUNCTION Floats pick(Floats values, const int32_t* places, int32_t first) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  return _mm256_permutevar8x32_ps(values, _mm256_sub_epi32(all, _mm256_set1_epi32(first)));
}
PIXELS_FUNCTION Floats load_halves(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PIXELS_FUNCTION void store_halves(uint16_t* to, Floats values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PIXELS_FUNCTION void stream_halves(uint16_t* to, Floats values) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif

#if PIXELS_LANES
// Streamed stores are seen by other threads after this.
PIXELS_FUNCTION void finish_streams() { _mm_sfence(); }
#endif

}  // namespace
}  // namespace pixels
