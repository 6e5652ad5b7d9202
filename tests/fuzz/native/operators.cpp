// The operators as ONNX Runtime calls them: kernels made from any attributes, asked about tensors of
// any shape and content, while ONNX Runtime's own calls, or allocations, fail.
#include <algorithm>
#include <cstdio>

#include "bytes.h"
#include "session.h"

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base);
extern "C" int recallseg_operators_levels();
extern "C" void recallseg_operators_choose(int index);

namespace {

constexpr size_t kMostNumbers = 1 << 16;

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  __builtin_trap();
}

std::vector<int64_t> shape(fuzz::Bytes& from, const std::vector<int64_t>& like) {
  std::vector<int64_t> made = like;
  if (from.once_in(6)) made.resize(static_cast<size_t>(from.between(0, 4)), 1);
  for (int64_t& side : made)
    if (from.once_in(8)) side = from.between(0, 40);
  while (session::elements(made) > kMostNumbers) *std::max_element(made.begin(), made.end()) = 1;
  return made;
}

void set(ort::Value& value, fuzz::Bytes& from, std::vector<int64_t> sides) {
  const size_t bytes = session::elements(sides) * sizeof(float);
  value.shape = std::move(sides);
  value.data.reset(new char[bytes]);
  from.fill(value.data.get(), bytes);
  if (from.once_in(2))  // bytes are hardly ever numbers of one size
    for (size_t i = 0; i < bytes / 4; ++i) {
      const float small = static_cast<float>(static_cast<signed char>(value.data[i * 4])) / 32;
      memcpy(value.data.get() + i * 4, &small, 4);
    }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  ort::SessionOptions options;
  must(RegisterCustomOps(&options, &session::base()) == nullptr, "they register");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes from(data, size);
  const auto& all = session::domain().operators;
  const ort::Operator& op = *all[from.take<uint8_t>() % 4];  // HalfLinear needs a GPU
  const std::string name = op.name(&op);
  recallseg_operators_choose(from.take<uint8_t>() % recallseg_operators_levels());

  ort::KernelInfo info;
  info.heads = from.between(1, 4);
  info.columns = from.between(1, 70);
  info.activation = from.between(0, 2);
  if (from.once_in(8)) info.heads = from.take<int64_t>();
  if (from.once_in(8)) info.columns = from.take<int64_t>();
  if (from.once_in(8)) info.activation = from.take<int64_t>();
  if ((info.has_scale = from.once_in(2))) info.scale = from.take<float>();
  const long failing = from.once_in(3) ? from.between(1, 40) : 0;
  const long starved = from.once_in(3) ? from.between(1, 30) : 0;
  const bool lasting = from.once_in(2);

  ort::KernelContext context;
  if (name == "Refine") {
    const int64_t n = from.between(1, 5), m = from.between(0, 4), y = from.between(1, 50),
                  x = from.between(1, 70), u = from.between(1, 20), v = from.between(1, 20);
    const std::vector<int64_t> sides[] = {
        {1, 3, y, x},         {1, n, y, x}, {1, m, y, x}, {u, 27 + n + m, 1, 1}, {u}, {v, u, 1, 1}, {v},
        {n, v, 1, 1}, {n}, {1, n, 1, 1}};
    for (size_t i = 0; i < 10; ++i)
      set(context.inputs[i], from, from.once_in(12) ? shape(from, sides[i]) : sides[i]);
  } else if (name != "Linear") {
    const int64_t h = info.heads > 0 && info.heads < 64 ? info.heads : 1;
    const int64_t b = from.between(1, 3), s = from.between(1, 110), l = from.between(1, 140),
                  e = h * from.between(1, 40), f = h * from.between(1, 40);
    set(context.inputs[0], from, shape(from, {b, s, e}));
    set(context.inputs[1], from, shape(from, {b, l, e}));
    set(context.inputs[2], from, shape(from, {b, l, f}));
  } else {
    const int64_t w = from.between(1, 50);
    const int64_t stripes = info.columns > 0 && info.columns < 5000 ? (info.columns + 15) / 16 : 1;
    set(context.inputs[0], from, shape(from, {from.between(1, 3), from.between(1, 80), w}));
    set(context.inputs[1], from, shape(from, {stripes, w, 16}));
    set(context.inputs[2], from, shape(from, {stripes, 16}));
  }

  void* kernel = nullptr;
  session::failing = failing;
  ort::Status* status = nullptr;
  {
    const starving::Starved hungry(starved, lasting);
    status = op.create(&op, session::table(), &info, &kernel);
    if (kernel != nullptr) {
      const starving::Fed fed;
      must(status == nullptr, "a kernel or a reason");
    }
    if (kernel != nullptr) status = op.compute(kernel, &context);
  }
  session::failing = 0;
  must(status != nullptr || kernel != nullptr, "a kernel or a reason");
  if (kernel != nullptr) {
    if (status == nullptr) {
      // Told to be done: every number of the output was written.
      const size_t count = session::elements(context.output.shape);
      for (size_t i = 0; i < count; ++i)
        must(memcmp(context.output.data.get() + i * 4, &session::kUnwritten, 4) != 0,
             "every number is written");
    }
    op.destroy(kernel);
  }
  if (status != nullptr) ort::Api(session::table()).release(status);
  if (session::open_things != 0) {
    std::fprintf(stderr, "%ld things of ONNX Runtime's were not given back\n",
                 session::open_things);
    __builtin_trap();
  }
  return 0;
}
