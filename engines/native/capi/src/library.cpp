#include "library.h"

#include "arrays.h"
#include "interpreter.h"
#include "progress.h"

namespace capi {
namespace {

constexpr std::size_t kMostItems = 65536;  // masks, names or tags in one call

void check_count(const void* items, std::size_t count, const char* what) {
  if (count > kMostItems)
    refuse(std::string(what) + ": a count of " + std::to_string(count) + " is too large");
  if (count > 0 && items == nullptr) refuse(std::string(what) + " is null, its count is not 0");
}

int checked_threads(int32_t threads) {
  if (threads < 0 || threads > 4096)
    refuse("threads must be 0 (all cores) to 4096, got " + std::to_string(threads));
  return threads;
}

void open(const char* function, const char* folder, const recallseg_library_options* options,
          recallseg_library** library) {
  required(library, "library") = nullptr;
  require_ready();
  required_text(folder, "folder");
  recallseg_library_options chosen = RECALLSEG_LIBRARY_OPTIONS_INIT;
  if (options != nullptr) chosen = read_struct(options, "options");
  const int threads = checked_threads(chosen.threads);
  std::shared_ptr<Library> opened;
  {
    const Gil gil;
    opened = std::make_shared<Library>(
        call(function, folder, text_or(chosen.bundle, nullptr), chosen.writable != 0 ? 1 : 0,
             text_or(chosen.engine, "onnxruntime-cpu"), text_or(chosen.precision, "fp32"), threads,
             gpu_of(chosen.gpu)));
  }
  publish(std::move(opened), library);
}

Ref mask_tuple(Loan& loan, const recallseg_mask& mask, const recallseg_image& image) {
  const std::string name =
      "mask of '" + std::string(required_text(mask.structure, "structure")) + "'";
  const Layout layout =
      layout_of(name.c_str(), mask.data, RECALLSEG_UINT8, {image.shape[0], image.shape[1]},
                {mask.strides[0], mask.strides[1]}, Access::kRead);
  return tuple_of(mask.structure, loan.lend(layout, Access::kRead));
}

}  // namespace

Library::~Library() {
  const Gil gil;
  guarded([&] { call("close_library", object); });  // c_interface.py logs what goes wrong
  object = Ref();
}

Segmenter::~Segmenter() {
  const Gil gil;
  object = Ref();
}

Ref names_of(const char* const* names, std::size_t count, const char* what) {
  check_count(names, count, what);
  return tuple_of_each(count, [&](std::size_t i) { return to_python(required_text(names[i], what)); });
}

Ref tags_of(const recallseg_tag* tags, std::size_t count) {
  check_count(tags, count, "tags");
  return tuple_of_each(count, [&](std::size_t i) {
    return tuple_of(required_text(tags[i].name, "a tag's name"),
                    required_text(tags[i].value, "a tag's value"));
  });
}

Ref gpu_of(const recallseg_gpu_options* gpu) {
  if (gpu == nullptr) return none();
  const recallseg_gpu_options chosen = read_struct(gpu, "gpu");
  if (chosen.cache_bytes > static_cast<std::uint64_t>(INT64_MAX))
    refuse("gpu: cache_bytes is too large");
  return tuple_of(chosen.ordinal,
                  static_cast<long long>(reinterpret_cast<std::intptr_t>(chosen.stream)),
                  text_or(chosen.provider, "auto"), chosen.cuda_graphs != 0 ? 1 : 0,
                  static_cast<long long>(chosen.cache_bytes));
}

}  // namespace capi

using namespace capi;

extern "C" {

recallseg_status recallseg_library_open(const char* folder,
                                        const recallseg_library_options* options,
                                        recallseg_library** library) {
  return guarded([&] { open("open_library", folder, options, library); });
}

recallseg_status recallseg_library_create(const char* folder,
                                          const recallseg_library_options* options,
                                          recallseg_library** library) {
  return guarded([&] { open("create_library", folder, options, library); });
}

recallseg_status recallseg_library_get_info(recallseg_library* library,
                                            recallseg_library_info* info) {
  return guarded([&] {
    require_ready();
    const auto self = get<Library>(library);
    recallseg_library_info answer = RECALLSEG_LIBRARY_INFO_INIT;
    std::string texts[4];
    {
      const Gil gil;
      const Ref facts = call("library_facts", self->object);
      Reader reader(facts.get());
      answer.writable = reader.truth() ? 1 : 0;
      answer.exemplars = static_cast<std::uint64_t>(reader.integer());
      answer.structures = static_cast<std::uint64_t>(reader.integer());
      for (std::string& text : texts) text = reader.text();
    }
    const std::lock_guard<std::mutex> lock(self->mutex);
    std::string* const kept[] = {&self->bundle_name, &self->bundle_identity, &self->digest,
                                 &self->notice};
    for (int i = 0; i < 4; ++i)
      if (*kept[i] != texts[i]) *kept[i] = std::move(texts[i]);
    answer.bundle_name = self->bundle_name.c_str();
    answer.bundle_identity = self->bundle_identity.c_str();
    answer.digest = self->digest.c_str();
    answer.notice = self->notice.c_str();
    write_struct(answer, info, "info");
  });
}

recallseg_status recallseg_library_add(recallseg_library* library, const recallseg_image* image,
                                       const recallseg_exemplar* exemplar, char* key,
                                       size_t key_size) {
  return guarded([&] {
    require_ready();
    const auto self = get<Library>(library);
    const recallseg_image pixels = read_struct(image, "image");
    const recallseg_exemplar what = read_struct(exemplar, "exemplar");
    const Layout layout = layout_of(pixels);
    check_count(what.masks, what.mask_count, "masks");
    if (key != nullptr && key_size < 1025)
      refuse("key_size must be at least 1025 bytes, got " + std::to_string(key_size));
    const Gil gil;
    const Ref added = with_loan([&](Loan& loan) {
      const Ref masks = tuple_of_each(what.mask_count, [&](std::size_t i) {
        return mask_tuple(loan, what.masks[i], pixels);
      });
      return call("add", self->object, loan.lend(layout, Access::kRead), masks,
                  names_of(what.absent, what.absent_count, "absent"),
                  tags_of(what.tags, what.tag_count), text_or(what.key, nullptr));
    });
    if (key == nullptr) return;
    // It is stored: what is left to do takes no memory.
    Py_ssize_t size = 0;
    const char* text = python.PyUnicode_AsUTF8AndSize(added.get(), &size);
    if (text == nullptr) throw_python_error();
    std::memcpy(key, text, static_cast<std::size_t>(size) + 1);
  });
}

recallseg_status recallseg_library_close(recallseg_library* library) {
  return guarded([&] {
    require_ready();
    close_handle<Library>(library);
  });
}

recallseg_status recallseg_segmenter_open(recallseg_library* library,
                                          const recallseg_segmenter_options* options,
                                          recallseg_segmenter** segmenter) {
  return guarded([&] {
    required(segmenter, "segmenter") = nullptr;
    require_ready();
    const auto of = get<Library>(library);
    recallseg_segmenter_options chosen = RECALLSEG_SEGMENTER_OPTIONS_INIT;
    if (options != nullptr) chosen = read_struct(options, "options");
    const int threads = checked_threads(chosen.threads);
    const auto audit = chosen.audit == nullptr ? nullptr : get<Audit>(chosen.audit);
    std::shared_ptr<Segmenter> opened;
    {
      const Gil gil;
      check_count(chosen.cores, chosen.core_count, "cores");
      const Ref scheduling =
          tuple_of(tuple_of_each(chosen.core_count, [&](std::size_t i) { return to_python(chosen.cores[i]); }),
                   chosen.nice, chosen.realtime);
      const Ref answer = call(
          "open_segmenter", of->object, chosen.k == 0 ? 4 : chosen.k,
          chosen.structures == nullptr && chosen.structure_count == 0
              ? none()
              : names_of(chosen.structures, chosen.structure_count, "structures"),
          text_or(chosen.engine, "onnxruntime-cpu"), text_or(chosen.precision, "fp32"), threads,
          chosen.memories, tags_of(chosen.tags, chosen.tag_count), chosen.reach,
          audit ? again(audit->object.get()) : none(), gpu_of(chosen.gpu), scheduling);
      Reader reader(answer.get());
      opened = std::make_shared<Segmenter>(of, audit, again(reader.next()));
      Reader names(reader.next());
      for (std::size_t i = names.size(); i > 0; --i) opened->structures.push_back(names.text());
    }
    publish(std::move(opened), segmenter);
  });
}

recallseg_status recallseg_segmenter_structure_count(recallseg_segmenter* segmenter,
                                                     size_t* count) {
  return guarded([&] {
    require_ready();
    required(count, "count") = get<Segmenter>(segmenter)->structures.size();
  });
}

recallseg_status recallseg_segmenter_structure(recallseg_segmenter* segmenter, size_t index,
                                               const char** name) {
  return guarded([&] {
    require_ready();
    const auto self = get<Segmenter>(segmenter);
    if (index >= self->structures.size())
      refuse("there are " + std::to_string(self->structures.size()) + " structures, not one " +
             std::to_string(index));
    required(name, "name") = self->structures[index].c_str();
  });
}

recallseg_status recallseg_segmenter_warm_up(recallseg_segmenter* segmenter, int32_t runs) {
  return guarded([&] {
    require_ready();
    const auto self = get<Segmenter>(segmenter);
    if (runs < 1 || runs > 1000) refuse("runs must be 1 to 1000, got " + std::to_string(runs));
    const Gil gil;
    call("warm_up", self->object, runs);
  });
}

recallseg_status recallseg_segmenter_calibrate(recallseg_segmenter* segmenter,
                                               recallseg_progress_callback progress, void* user) {
  return guarded([&] {
    require_ready();
    const auto self = get<Segmenter>(segmenter);
    const Begun begun(*self);
    const Progress to{progress, user};
    std::vector<recallseg_calibration> found;
    {
      const Gil gil;
      const Ref answer =
          call("calibrate", self->object, report_function(), address_of(to), begun.pair());
      Reader structures(answer.get());
      for (std::size_t i = structures.size(); i > 0; --i) {
        Reader reader(structures.next());
        recallseg_calibration one = RECALLSEG_CALIBRATION_INIT;
        one.calibrated = reader.truth() ? 1 : 0;
        one.exemplars = static_cast<std::uint64_t>(reader.integer());
        one.distance = reader.real();
        one.iou = reader.real();
        one.dice = reader.real();
        one.left_out = static_cast<std::int32_t>(reader.integer());
        found.push_back(one);
      }
    }
    const std::lock_guard<std::mutex> lock(self->mutex);
    self->calibrations = std::move(found);
  });
}

recallseg_status recallseg_segmenter_get_calibration(recallseg_segmenter* segmenter, size_t index,
                                                     recallseg_calibration* calibration) {
  return guarded([&] {
    require_ready();
    const auto self = get<Segmenter>(segmenter);
    const std::lock_guard<std::mutex> lock(self->mutex);
    if (self->calibrations.empty())
      throw Error(RECALLSEG_E_STATE,
                  "this segmenter was not calibrated: call recallseg_segmenter_calibrate before");
    if (index >= self->calibrations.size())
      refuse("there are " + std::to_string(self->calibrations.size()) + " structures, not one " +
             std::to_string(index));
    write_struct(self->calibrations[index], calibration, "calibration");
  });
}

recallseg_status recallseg_segmenter_cancel(recallseg_segmenter* segmenter) {
  return guarded([&] {
    require_ready();
    ++get<Segmenter>(segmenter)->cancels;
  });
}

recallseg_status recallseg_segmenter_close(recallseg_segmenter* segmenter) {
  return guarded([&] {
    require_ready();
    close_handle<Segmenter>(segmenter);
  });
}
}
