#include <chrono>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "interpreter.h"
#include "library.h"
#include "result.h"

namespace capi {
namespace {

using Clock = std::chrono::steady_clock;

// What is left of a deadline once the GIL is held; infinite for none.
double milliseconds_left(double deadline_ms, Clock::time_point start) {
  if (deadline_ms == 0) return std::numeric_limits<double>::infinity();
  const double spent = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  if (spent >= deadline_ms)
    throw Error(RECALLSEG_E_DEADLINE, "not done in " + std::to_string(deadline_ms) + " ms: " +
                                          std::to_string(spent) +
                                          " ms had passed waiting for the interpreter");
  return deadline_ms - spent;
}

struct Targets {
  Layout label_map, masks;  // dtype "" where not wanted
};

Targets targets_of(const recallseg_output& output, const recallseg_image& image,
                   std::size_t structures) {
  Targets targets;
  if (output.rows != image.shape[0] || output.columns != image.shape[1])
    refuse("output: is " + std::to_string(output.rows) + " x " + std::to_string(output.columns) +
           ", the image " + std::to_string(image.shape[0]) + " x " +
           std::to_string(image.shape[1]));
  if (output.label_map == nullptr && output.masks == nullptr)
    refuse("output: label_map and masks are both null");
  if (output.label_map != nullptr)
    targets.label_map =
        layout_of("output label_map", output.label_map, RECALLSEG_UINT8,
                  {output.rows, output.columns},
                  {output.label_strides, output.label_strides + 2}, Access::kWrite);
  if (output.masks != nullptr) {
    if (output.mask_count != static_cast<std::int64_t>(structures))
      refuse("output: mask_count is " + std::to_string(output.mask_count) +
             ", the segmenter has " + std::to_string(structures) + " structures");
    targets.masks = layout_of("output masks", output.masks, RECALLSEG_UINT8,
                              {output.mask_count, output.rows, output.columns},
                              {output.mask_strides, output.mask_strides + 3}, Access::kWrite);
  }
  targets.label_map.place = targets.masks.place =
      place_of("output", output.location, output.stream);
  return targets;
}

Ref lend_if_wanted(Loan& loan, const Layout& layout) {
  return layout.lowest == nullptr ? none() : loan.lend(layout, Access::kWrite);
}

}  // namespace
}  // namespace capi

using namespace capi;

extern "C" recallseg_status recallseg_segment(recallseg_segmenter* segmenter,
                                              const recallseg_image* image,
                                              const recallseg_output* output, double deadline_ms,
                                              recallseg_result** result) {
  return guarded([&] {
    const auto start = Clock::now();
    if (result != nullptr) *result = nullptr;
    require_ready();
    const auto self = get<Segmenter>(segmenter);
    const Begun begun(*self);
    const recallseg_image pixels = read_struct(image, "image");
    const recallseg_output target = read_struct(output, "output");
    if (!std::isfinite(deadline_ms) || deadline_ms < 0)
      refuse("deadline_ms must be milliseconds, or 0 for none");
    const Layout from = layout_of(pixels);
    const Targets to = targets_of(target, pixels, self->structures.size());
    const double area = pixels.spacing[0] * pixels.spacing[1];
    std::shared_ptr<Result> read;
    {
      const Gil gil;
      const double left = milliseconds_left(deadline_ms, start);
      with_loan([&](Loan& loan) {
        const Ref record =
            call("segment", self->object, loan.lend(from, Access::kRead),
                 lend_if_wanted(loan, to.label_map), lend_if_wanted(loan, to.masks),
                 std::isfinite(left) ? to_python(left) : none(),
                 area > 0 ? area : std::numeric_limits<double>::quiet_NaN(),
                 result == nullptr ? 0 : 1, begun.pair());
        if (result != nullptr) read = std::make_shared<Result>(record.get());
        return true;
      });
    }
    if (result != nullptr) publish(std::move(read), result);
  });
}
