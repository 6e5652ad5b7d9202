// Attention with 8-bit products at every level of vector units that this processor has: against
// attention in double precision, against the same at another level, and the same bits for any number
// of threads. Prints the worst errors; the exit status is 1 if one is too large.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "attention.h"

namespace {

using namespace attention;

// Of the range of the values.
constexpr double kExact = 0.02;    // to attention in double precision, scores within +-10
constexpr double kBetween = 1e-3;  // from one level to another: an exponential rounded the other way

uint32_t state = 1;

float uniform() {  // -1..1, by Numerical Recipes' generator
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
}

struct Case {
  const char* name;
  int64_t batch, heads, queries, keys, width, values;
  float spread;  // of queries and keys: 0 is uniform attention, 4 picks few keys
  float offset;  // of all keys and values
};

struct Data {
  std::vector<float> query, key, value;
  Call call;
};

Data make(const Case& c) {
  Data data;
  data.query.resize(static_cast<size_t>(c.batch * c.queries * c.heads * c.width));
  data.key.resize(static_cast<size_t>(c.batch * c.keys * c.heads * c.width));
  data.value.resize(static_cast<size_t>(c.batch * c.keys * c.heads * c.values));
  for (float& x : data.query) x = uniform() * c.spread;
  for (float& x : data.key) x = uniform() * c.spread + c.offset;
  for (float& x : data.value) x = uniform() + c.offset;
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.width));
  data.call = {c.batch, c.heads, {c.queries, c.keys, c.width, c.values, scale},
               data.query.data(), data.key.data(), data.value.data(), nullptr};
  return data;
}

struct Threads {
  int count;
};

void run_on(void* pool, Task task, size_t count, void* given) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) task(given, i);
  };
  for (int i = 1; i < static_cast<Threads*>(pool)->count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> attended(Call call, int threads) {
  std::vector<float> output(
      static_cast<size_t>(call.batch * call.sizes.queries * call.heads * call.sizes.values));
  call.output = output.data();
  size_t bytes = scratch_bytes(call);
  const auto own = std::make_unique<char[]>(bytes + 64);
  void* place = own.get();
  size_t space = bytes + 64;
  std::align(64, bytes, place, space);
  Threads pool{threads};
  if (!attend(call, place, run_on, &pool)) std::abort();
  return output;
}

std::vector<float> reference(const Call& call) {
  const Sizes& s = call.sizes;
  std::vector<float> output(
      static_cast<size_t>(call.batch * s.queries * call.heads * s.values));
  std::vector<double> weights(static_cast<size_t>(s.keys)), sums(static_cast<size_t>(s.values));
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h)
      for (int64_t q = 0; q < s.queries; ++q) {
        const float* query = call.query + ((b * s.queries + q) * call.heads + h) * s.width;
        double most = -1e300, total = 0.0;
        for (int64_t k = 0; k < s.keys; ++k) {
          const float* key = call.key + ((b * s.keys + k) * call.heads + h) * s.width;
          double score = 0.0;
          for (int64_t c = 0; c < s.width; ++c) score += double{query[c]} * key[c];
          weights[static_cast<size_t>(k)] = score * s.scale;
          most = std::fmax(most, score * s.scale);
        }
        for (double& sum : sums) sum = 0.0;
        for (int64_t k = 0; k < s.keys; ++k) {
          const double weight = std::exp(weights[static_cast<size_t>(k)] - most);
          total += weight;
          const float* value = call.value + ((b * s.keys + k) * call.heads + h) * s.values;
          for (int64_t c = 0; c < s.values; ++c)
            sums[static_cast<size_t>(c)] += weight * value[c];
        }
        float* out = output.data() + ((b * s.queries + q) * call.heads + h) * s.values;
        for (int64_t c = 0; c < s.values; ++c)
          out[c] = static_cast<float>(sums[static_cast<size_t>(c)] / total);
      }
  return output;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double found = std::fabs(double{a[i]} - b[i]);
    worst = found <= worst ? worst : found;  // a NaN is worse than anything
    if (std::isnan(found)) return std::numeric_limits<double>::infinity();
  }
  return worst / 2.0;  // of the range of the values
}

int failures = 0;

void expect(bool holds, const char* what, const char* where, double error) {
  if (holds) return;
  std::printf("FAILED %s: %s: %.2e\n", where, what, error);
  failures += 1;
}

const Case kCases[] = {
    {"one key", 1, 1, 7, 1, 8, 8, 1.0f, 0.0f},
    {"one of everything", 1, 1, 1, 1, 1, 1, 1.0f, 0.0f},
    {"uniform", 1, 2, 13, 200, 32, 32, 0.0f, 3.0f},
    {"plain", 2, 3, 50, 77, 20, 24, 1.0f, 1.0f},
    {"one block", 1, 1, 96, 64, 96, 96, 1.0f, 0.0f},
    {"one more than blocks and tiles", 1, 1, 97, 65, 33, 17, 1.0f, -2.0f},
    {"many heads", 9, 2, 5, 16, 96, 96, 1.0f, 0.5f},
    {"memories", 1, 1, 20, 1100, 256, 64, 2.0f, 0.0f},
    {"wide", 1, 1, 9, 70, 300, 300, 1.0f, 0.0f},
    {"peaky", 1, 2, 40, 300, 64, 64, 3.0f, 1.0f},
};

void check_values() {
  double exact = 0.0, between = 0.0;
  for (const Case& c : kCases) {
    const Data data = make(c);
    const std::vector<float> expected = reference(data.call);
    std::vector<float> first;
    for (int i = 0; i < levels().count; ++i) {
      choose(*levels().first[i]);
      const std::vector<float> found = attended(data.call, 1);
      const double error = difference(found, expected);
      exact = std::fmax(exact, error);
      expect(error <= kExact, level().name, c.name, error);
      expect(attended(data.call, 3) == found, "differs with three threads", c.name, 0.0);
      if (i == 0) first = found;
      const double other = difference(found, first);
      between = std::fmax(between, other);
      expect(other <= kBetween, "differs between levels", c.name, other);
    }
  }
  std::printf("worst error %.1e, between levels %.1e of the values' range\n", exact, between);
}

// Scores far apart cannot be told exactly with 8 bits, but no output leaves the values' range.
void check_large() {
  const float ranges[][2] = {{1e3f, 1.0f}, {1e15f, 1e15f}, {1e-20f, 1e-20f}, {1e-38f, 1.0f}};
  for (const auto& range : ranges) {
    Data data = make({"large", 1, 2, 30, 150, 24, 24, 1.0f, 0.0f});
    for (float& x : data.query) x *= range[0];
    for (float& x : data.key) x *= range[0];
    for (float& x : data.value) x *= range[1];
    for (int i = 0; i < levels().count; ++i) {
      choose(*levels().first[i]);
      for (const float x : attended(data.call, 1))
        if (!(std::fabs(x) <= 1.001f * range[1])) {
          expect(false, level().name, "large magnitudes", x);
          break;
        }
    }
  }
}

// What is not finite is not hidden: NaN where it came from, whatever vector it lies in.
void check_flaws() {
  const float flaws[] = {std::numeric_limits<float>::quiet_NaN(),
                         std::numeric_limits<float>::infinity()};
  for (int i = 0; i < levels().count; ++i) {
    choose(*levels().first[i]);
    for (const float flaw : flaws)
      for (int which = 0; which < 3; ++which)
        for (const int64_t channel : {0, 23, 47}) {
          Data data = make({"flaw", 2, 2, 10, 70, 24, 24, 1.0f, 0.0f});
          std::vector<float>& tensor =
              which == 0 ? data.query : which == 1 ? data.key : data.value;
          tensor[static_cast<size_t>(9 * 48 + channel)] = flaw;  // token 9 of the first batch
          const std::vector<float> found = attended(data.call, 1);
          const auto at = static_cast<size_t>(9 * 48 + channel);
          expect(std::isnan(found[at]), level().name, "a flaw is hidden", found[at]);
          expect(!std::isnan(found.back()), level().name, "a flaw spreads to another batch", 0.0);
        }
  }
}

}  // namespace

int main() {
  check_values();
  check_large();
  check_flaws();
  return failures == 0 ? 0 : 1;
}
