#include <cmath>

#include "arrays.h"
#include "interpreter.h"
#include "library.h"
#include "result.h"

namespace capi {
namespace {

class Stream final : public Object {
 public:
  static constexpr Kind kKind = Kind::kStream;
  Stream(std::shared_ptr<Segmenter> of, recallseg_frame_callback to, void* with)
      : segmenter(std::move(of)), callback(to), user(with) {}
  ~Stream() override {
    const Gil gil;
    Stream::stop();
    object = Ref();
  }
  void stop() override {
    const Gil gil;
    if (object) guarded([&] { call("close_stream", object); });
  }

  const std::shared_ptr<Segmenter> segmenter;
  const recallseg_frame_callback callback;
  void* const user;
  Ref object;  // recallseg.runtime.services.stream.Stream
};

recallseg_frame read_frame(Reader& reader, std::string& message, recallseg_result** result) {
  recallseg_frame frame{};
  frame.struct_size = sizeof frame;
  frame.number = static_cast<std::uint64_t>(reader.integer());
  frame.waited_ms = reader.real();
  frame.latency_ms = reader.real();
  frame.status = static_cast<recallseg_status>(reader.integer());
  message = reader.text();
  frame.message = message.c_str();
  if (frame.status != RECALLSEG_OK) return frame;
  publish(std::make_shared<Result>(reader.next()), result);
  frame.result = *result;
  frame.label_map = reinterpret_cast<const uint8_t*>(reader.integer());
  frame.rows = reader.integer();
  frame.columns = reader.integer();
  return frame;
}

// emit(number, waited, latency, status, message, record, address, rows, columns), called by the
// stream's thread, whose frame keeps the label map. `self` is the stream's handle, as it may have
// been closed meanwhile.
PyObject* emit(PyObject* self, PyObject* arguments) {
  const recallseg_status status = guarded([&] {
    const auto handle = static_cast<std::uintptr_t>(python.PyLong_AsLongLong(self));
    const auto stream = std::static_pointer_cast<Stream>(find_object(Kind::kStream, handle));
    Reader reader(arguments);
    std::string message;
    recallseg_result* result = nullptr;
    const recallseg_frame frame = read_frame(reader, message, &result);
    come_first_at_exit();
    PyThreadState* const thread = python.PyEval_SaveThread();
    if (!is_ending()) stream->callback(&frame, stream->user);
    if (result != nullptr) guarded([&] { close_handle<Result>(result); });
    python.PyEval_RestoreThread(thread);
  });
  const bool closed = status == RECALLSEG_E_HANDLE;  // nobody waits for this frame any more
  return status == RECALLSEG_OK || closed ? python.Py_BuildValue("") : raise_last_error();
}

PyMethodDef emit_definition = {"emit", emit, METH_VARARGS, nullptr};

recallseg_status simply(recallseg_stream* stream, const char* function) {
  return guarded([&] {
    require_ready();
    const auto self = get<Stream>(stream);
    const Gil gil;
    call(function, self->object);
  });
}

void check_milliseconds(double value, const char* name) {
  if (!std::isfinite(value) || value < 0)
    refuse(std::string(name) + " must be milliseconds, 0 or more");
}

}  // namespace
}  // namespace capi

using namespace capi;

extern "C" {

recallseg_status recallseg_stream_open(recallseg_segmenter* segmenter,
                                       const recallseg_stream_options* options,
                                       recallseg_frame_callback callback, void* user,
                                       recallseg_stream** stream) {
  return guarded([&] {
    required(stream, "stream") = nullptr;
    require_ready();
    auto of = get<Segmenter>(segmenter);
    if (callback == nullptr) refuse("callback is null");
    recallseg_stream_options chosen = RECALLSEG_STREAM_OPTIONS_INIT;
    if (options != nullptr) chosen = read_struct(options, "options");
    check_milliseconds(chosen.deadline_ms, "deadline_ms");
    const auto opened = std::make_shared<Stream>(of, callback, user);
    const std::uintptr_t handle = insert_object(Kind::kStream, opened);
    try {
      const Gil gil;
      const Ref self = to_python(static_cast<long long>(handle));
      opened->object =
          call("open_stream", of->object,
               checked((python.PyCFunction_NewEx)(&emit_definition, self.get(), nullptr)),
               chosen.deadline_ms > 0 ? to_python(chosen.deadline_ms) : none(),
               chosen.queue == 0 ? 1 : chosen.queue);
    } catch (...) {
      remove_object(Kind::kStream, handle);
      throw;
    }
    *stream = reinterpret_cast<recallseg_stream*>(handle);
  });
}

recallseg_status recallseg_stream_push(recallseg_stream* stream, const recallseg_image* image,
                                       uint64_t* number) {
  return guarded([&] {
    require_ready();
    const auto self = get<Stream>(stream);
    const Layout from = layout_of(read_struct(image, "image"));
    const Gil gil;
    const auto pushed = with_loan([&](Loan& loan) {
      const Ref answer = call("push_frame", self->object, self->segmenter->object,
                              loan.lend(from, Access::kRead));
      return python.PyLong_AsLongLong(answer.get());
    });
    if (number != nullptr) *number = static_cast<std::uint64_t>(pushed);
  });
}

recallseg_status recallseg_stream_pause(recallseg_stream* stream) {
  return simply(stream, "pause_stream");
}

recallseg_status recallseg_stream_resume(recallseg_stream* stream) {
  return simply(stream, "resume_stream");
}

recallseg_status recallseg_stream_restart(recallseg_stream* stream) {
  return simply(stream, "restart_stream");
}

recallseg_status recallseg_stream_drain(recallseg_stream* stream, double timeout_ms) {
  return guarded([&] {
    require_ready();
    const auto self = get<Stream>(stream);
    check_milliseconds(timeout_ms, "timeout_ms");
    const Gil gil;
    const Ref done = call("drain_stream", self->object, timeout_ms / 1e3);
    if (python.PyObject_IsTrue(done.get()) != 1)
      throw Error(RECALLSEG_E_DEADLINE,
                  "frames still wait after " + std::to_string(timeout_ms) + " ms");
  });
}

recallseg_status recallseg_stream_get_statistics(recallseg_stream* stream,
                                                 recallseg_stream_statistics* statistics) {
  return guarded([&] {
    require_ready();
    const auto self = get<Stream>(stream);
    recallseg_stream_statistics answer = RECALLSEG_STREAM_STATISTICS_INIT;
    {
      const Gil gil;
      const Ref counts = call("count_frames", self->object);
      Reader reader(counts.get());
      for (uint64_t* count : {&answer.pushed, &answer.segmented, &answer.dropped, &answer.late,
                              &answer.failed, &answer.ignored})
        *count = static_cast<std::uint64_t>(reader.integer());
    }
    write_struct(answer, statistics, "statistics");
  });
}

recallseg_status recallseg_stream_close(recallseg_stream* stream) {
  return guarded([&] {
    require_ready();
    const auto self = std::static_pointer_cast<Stream>(
        remove_object(Kind::kStream, reinterpret_cast<std::uintptr_t>(stream)));
    const Gil gil;
    call("close_stream", self->object);
  });
}
}
