// The operators at every level of vector units that this processor has: against the same in double
// precision, against another level, and the same bits for any number of threads. Prints the worst
// errors; the exit status is 1 if one is too large.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "exact.h"
#include "head.h"
#include "quantized_attention.h"

namespace {

using namespace operators;

// Both kinds of attention, and how far one may be from the same in double precision and from another
// level, in parts of the values' range. With 8 bits: scores within +-10; between levels an exponential
// is rounded the other way.
struct Kind {
  const char* name;
  bool exact;
  double error, between;
};
const Kind kKinds[] = {{"8-bit", false, 0.02, 1e-3}, {"fp32", true, 3e-6, 3e-6}};

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
  AttentionCall call;
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

std::vector<float> attended(AttentionCall call, const Kind& kind, int threads) {
  std::vector<float> output(
      static_cast<size_t>(call.batch * call.sizes.queries * call.heads * call.sizes.values));
  call.output = output.data();
  Threads pool{threads};
  if (kind.exact) {
    if (!attend_exact(call, run_on, &pool)) std::abort();
    return output;
  }
  size_t bytes = scratch_bytes(call);
  const auto own = std::make_unique<char[]>(bytes + 64);
  void* place = own.get();
  size_t space = bytes + 64;
  std::align(64, bytes, place, space);
  if (!attend_quantized(call, place, run_on, &pool)) std::abort();
  return output;
}

std::vector<float> reference(const AttentionCall& call) {
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

void check_values(const Kind& kind) {
  double exact = 0.0, between = 0.0;
  for (const Case& c : kCases) {
    const Data data = make(c);
    const std::vector<float> expected = reference(data.call);
    std::vector<float> first;
    for (int i = 0; i < levels().count; ++i) {
      choose(levels().first[i]);
      const std::vector<float> found = attended(data.call, kind, 1);
      const double error = difference(found, expected);
      exact = std::fmax(exact, error);
      expect(error <= kind.error * (1.0 + std::fabs(double{c.offset})), level().name, c.name, error);
      expect(attended(data.call, kind, 3) == found, "differs with three threads", c.name, 0.0);
      if (i == 0) first = found;
      const double other = difference(found, first);
      between = std::fmax(between, other);
      expect(other <= kind.between, "differs between levels", c.name, other);
    }
  }
  std::printf("attention, %s: worst error %.1e, between levels %.1e of the values' range\n",
              kind.name, exact, between);
}

// Scores far apart cannot be told exactly with 8 bits, but no output leaves the values' range.
void check_large(const Kind& kind) {
  const float ranges[][2] = {{1e3f, 1.0f}, {1e15f, 1e15f}, {1e-20f, 1e-20f}, {1e-38f, 1.0f}};
  for (const auto& range : ranges) {
    Data data = make({"large", 1, 2, 30, 150, 24, 24, 1.0f, 0.0f});
    for (float& x : data.query) x *= range[0];
    for (float& x : data.key) x *= range[0];
    for (float& x : data.value) x *= range[1];
    for (int i = 0; i < levels().count; ++i) {
      choose(levels().first[i]);
      for (const float x : attended(data.call, kind, 1))
        if (!(std::fabs(x) <= 1.001f * range[1])) {
          expect(false, level().name, "large magnitudes", x);
          break;
        }
    }
  }
}

// What is not finite is not hidden: NaN where it came from, whatever vector it lies in.
void check_flaws(const Kind& kind) {
  const float flaws[] = {std::numeric_limits<float>::quiet_NaN(),
                         std::numeric_limits<float>::infinity()};
  for (int i = 0; i < levels().count; ++i) {
    choose(levels().first[i]);
    for (const float flaw : flaws)
      for (int which = 0; which < 3; ++which)
        for (const int64_t channel : {0, 23, 47}) {
          Data data = make({"flaw", 2, 2, 10, 70, 24, 24, 1.0f, 0.0f});
          std::vector<float>& tensor =
              which == 0 ? data.query : which == 1 ? data.key : data.value;
          const auto at = static_cast<size_t>(9 * 48 + channel);  // token 9 of the first batch
          tensor[at] = flaw;
          if (kind.exact && std::isinf(flaw) && which < 2) {
            // Of either sign, as the other factor has it: a score beyond all others, or none.
            for (size_t j = 0; j < data.query.size(); ++j) data.query[j] = std::fabs(data.query[j]);
            for (size_t j = 0; j < data.key.size(); ++j) data.key[j] = std::fabs(data.key[j]);
          }
          const std::vector<float> found = attended(data.call, kind, 1);
          expect(!std::isfinite(found[at]), level().name, "a flaw is hidden", found[at]);
          expect(std::isfinite(found.back()), level().name, "a flaw spreads to another batch", 0.0);
        }
  }
}

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kRelu: return x > 0.0 ? x : 0.0;
    default: return x;
  }
}

struct Product {
  int64_t rows, width, columns;
  Activation activation;
};

const Product kProducts[] = {
    {1, 1, 1, Activation::kNone},      {7, 3, 17, Activation::kGelu},
    {100, 96, 384, Activation::kGelu}, {49, 64, 48, Activation::kRelu},
    {3, 500, 1000, Activation::kNone}, {5000, 20, 33, Activation::kNone},
    {0, 5, 5, Activation::kNone},
};

// Of the size of a sum's terms: fp32 rounds each of `width` additions.
constexpr double kRounding = 1e-6;

void check_products() {
  double worst = 0.0;
  for (const Product& p : kProducts) {
    const int64_t stripes = (p.columns + kStripe - 1) / kStripe;
    std::vector<float> input(static_cast<size_t>(p.rows * p.width));
    std::vector<float> weights(static_cast<size_t>(stripes * p.width * kStripe));
    std::vector<float> bias(static_cast<size_t>(stripes * kStripe));
    for (float& x : input) x = 4.0f * uniform();
    for (float& x : weights) x = uniform();
    for (float& x : bias) x = uniform();
    const auto apply = [&](int threads) {
      std::vector<float> output(static_cast<size_t>(p.rows * p.columns), 7.0f);
      Threads pool{threads};
      apply_linear({p.rows, p.width, p.columns, p.activation, input.data(), weights.data(),
                    bias.data(), output.data()}, run_on, &pool);
      return output;
    };
    for (int i = 0; i < levels().count; ++i) {
      choose(levels().first[i]);
      const std::vector<float> found = apply(1);
      expect(apply(3) == found, "a product differs with three threads", level().name, 0.0);
      for (int64_t row = 0; row < p.rows; ++row)
        for (int64_t c = 0; c < p.columns; ++c) {
          double sum = bias[static_cast<size_t>(c)], size = std::fabs(sum);
          for (int64_t k = 0; k < p.width; ++k) {
            const double term =
                double{input[static_cast<size_t>(row * p.width + k)]} *
                weights[static_cast<size_t>((c / kStripe * p.width + k) * kStripe + c % kStripe)];
            sum += term;
            size += std::fabs(term);
          }
          const double is = found[static_cast<size_t>(row * p.columns + c)];
          const double error = std::fabs(is - activated(sum, p.activation)) / size;
          worst = std::fmax(worst, error);
          if (!(error <= kRounding)) expect(false, "a product", level().name, error);
        }
    }
  }
  std::printf("products: worst error %.1e of the terms\n", worst);
}

// GELU alone, where its polynomial has its ends; what is not finite stays so.
void check_activations() {
  const float inputs[] = {-100.0f, -9.0f, -8.0f, -5.0f, -1.0f, -1e-3f, 0.0f, 1e-3f, 1.0f,
                          5.0f,    8.0f,  9.0f,  1e30f, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()};
  constexpr int64_t kCount = std::size(inputs);
  std::vector<float> weights(kStripe, 0.0f), bias(kStripe, 0.0f);
  weights[0] = 1.0f;
  for (int i = 0; i < levels().count; ++i) {
    choose(levels().first[i]);
    for (const Activation activation : {Activation::kGelu, Activation::kRelu}) {
      std::vector<float> found(kCount);
      Threads pool{1};
      apply_linear({kCount, 1, 1, activation, inputs, weights.data(), bias.data(), found.data()},
                   run_on, &pool);
      for (size_t j = 0; j < kCount; ++j) {
        if (!std::isfinite(inputs[j])) {
          expect(!std::isfinite(found[j]), level().name, "an activation hides a flaw", found[j]);
          continue;
        }
        const double expected = activated(inputs[j], activation);
        const double error = std::fabs(found[j] - expected);
        expect(error <= 2e-7 * std::fmax(1.0, std::fabs(expected)), level().name, "activation", error);
      }
    }
  }
}

struct Head {
  int64_t height, width, structures, around, units1, units2;
};

const Head kHeads[] = {
    {1, 1, 1, 2, 1, 1}, {5, 7, 2, 4, 3, 4}, {16, 16, 1, 2, 32, 16}, {33, 97, 3, 6, 31, 17},
    {130, 100, 4, 8, 32, 16},
};

std::vector<float> random_floats(int64_t count, float most) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = most * uniform();
  return values;
}

// Its values are compared with the portable graph's by tests/unit/engines/test_head_operator.py; here
// levels with each other, any number of threads, and that what is not finite stays so where it is.
void check_heads() {
  double between = 0.0;
  for (const Head& h : kHeads) {
    const int64_t pixels = h.height * h.width, features = kOwnFeatures + h.structures + h.around;
    std::vector<float> image = random_floats(3 * pixels, 1.0f);
    const std::vector<float> logits = random_floats(h.structures * pixels, 5.0f),
                             beside = random_floats(h.around * pixels, 5.0f),
                             first = random_floats(h.units1 * features, 0.3f),
                             second = random_floats(h.units2 * h.units1, 0.3f),
                             third = random_floats(h.structures * h.units2, 0.3f),
                             biases1 = random_floats(h.units1, 0.3f),
                             biases2 = random_floats(h.units2, 0.3f),
                             biases3 = random_floats(h.structures, 0.3f),
                             mix = random_floats(h.structures, 1.0f);
    const auto refined = [&](int threads) {
      std::vector<float> output(static_cast<size_t>(h.structures * pixels), 7.0f);
      HeadCall call{h.height, h.width, h.structures, h.around, h.units1, h.units2,
                    image.data(), logits.data(), beside.data(),
                    {first.data(), second.data(), third.data()},
                    {biases1.data(), biases2.data(), biases3.data()},
                    mix.data(), output.data(), nullptr};
      size_t bytes = static_cast<size_t>(head_floats(call)) * sizeof(float);
      const auto own = std::make_unique<char[]>(bytes + 64);
      void* place = own.get();
      size_t space = bytes + 64;
      std::align(64, bytes, place, space);
      Threads pool{threads};
      refine_head(call, static_cast<float*>(place), run_on, &pool);
      return output;
    };
    std::vector<float> reference;
    for (int i = 0; i < levels().count; ++i) {
      choose(levels().first[i]);
      const std::vector<float> found = refined(1);
      expect(refined(3) == found, "a head differs with three threads", level().name, 0.0);
      if (i == 0) reference = found;
      const double other = difference(found, reference);
      between = std::fmax(between, other);
      expect(other <= 1e-5, "a head differs between levels", level().name, other);
    }
    image[0] = std::numeric_limits<float>::quiet_NaN();
    expect(std::isnan(refined(1)[0]), level().name, "a head hides a flaw", 0.0);
  }
  std::printf("heads: between levels %.1e\n", between);
}

// ONNX Runtime may refuse to run tasks, which leaves all that they would have written as it was.
void check_refused_tasks() {
  for (const int64_t heads : {int64_t{2}, int64_t{64}}) {
    const Data data = make({"refused", 1, heads, 3, 40, 8, 8, 1.0f, 0.0f});
    AttentionCall call = data.call;
    std::vector<float> output(static_cast<size_t>(3 * heads * 8));
    call.output = output.data();
    std::vector<char> scratch(scratch_bytes(call) + 64);
    void* place = scratch.data();
    size_t space = scratch.size();
    std::align(64, space - 64, place, space);
    attend_quantized(call, place, [](void*, Task, size_t, void*) {}, nullptr);
  }
}

}  // namespace

int main() {
  for (const Kind& kind : kKinds) {
    check_values(kind);
    check_large(kind);
    check_flaws(kind);
  }
  check_products();
  check_activations();
  check_heads();
  check_refused_tasks();
  return failures == 0 ? 0 : 1;
}
