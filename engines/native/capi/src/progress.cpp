#include "progress.h"

#include "interpreter.h"

namespace capi {
namespace {

// report(address, done, total), called by Python under the GIL; the callback runs without it.
PyObject* report(PyObject*, PyObject* arguments) {
  bool go_on = false;
  const recallseg_status status = guarded([&] {
    Reader reader(arguments);
    const auto& to = *reinterpret_cast<const Progress*>(reader.integer());
    const auto done = static_cast<std::uint64_t>(reader.integer());
    const auto total = static_cast<std::uint64_t>(reader.integer());
    PyThreadState* const thread = python.PyEval_SaveThread();
    go_on = !is_ending() && (to.callback == nullptr || to.callback(done, total, to.user) == 0);
    python.PyEval_RestoreThread(thread);
  });
  if (status != RECALLSEG_OK) return raise_last_error();
  return python.PyLong_FromLongLong(go_on ? 1 : 0);
}

PyMethodDef report_definition = {"report", report, METH_VARARGS, nullptr};

}  // namespace

Ref report_function() {
  return checked((python.PyCFunction_NewEx)(&report_definition, nullptr, nullptr));
}

}  // namespace capi
