// Python's C API, found at run time: librecallseg is not linked with any libpython.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>

#include "error.h"

namespace capi {

#define CAPI_PYTHON_FUNCTIONS(X)                                                                   \
  X(Py_BuildValue) X(Py_DecRef) X(Py_GetVersion) X(Py_IncRef) X(Py_InitializeFromConfig)           \
  X(Py_IsInitialized) X(PyCFunction_NewEx) X(PyConfig_Clear) X(PyConfig_InitIsolatedConfig)        \
  X(PyConfig_SetBytesString) X(PyErr_Clear) X(PyErr_Fetch) X(PyErr_NormalizeException)             \
  X(PyErr_SetString) X(PyEval_RestoreThread) X(PyEval_SaveThread) X(PyFloat_AsDouble)              \
  X(PyFloat_FromDouble) X(PyGILState_Ensure) X(PyGILState_Release) X(PyImport_ImportModule)        \
  X(PyList_Insert) X(PyLong_AsLongLong) X(PyLong_FromLongLong) X(PyMemoryView_FromMemory)          \
  X(PyObject_CallObject) X(PyObject_GetAttrString) X(PyObject_IsTrue) X(PyPreConfig_InitIsolatedConfig) \
  X(Py_PreInitialize) X(PyStatus_Exception)                                                        \
  X(PySys_GetObject) X(PyTuple_GetItem) X(PyTuple_New) X(PyTuple_SetItem) X(PyTuple_Size)          \
  X(PyUnicode_AsUTF8AndSize) X(PyUnicode_DecodeUTF8)

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif
struct PythonApi {
#define CAPI_MEMBER(name) decltype(&::name) name = nullptr;
  CAPI_PYTHON_FUNCTIONS(CAPI_MEMBER)
#undef CAPI_MEMBER
  std::string file;  // that it was loaded from
};
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

// Of the loaded interpreter; valid once `load_python` has returned.
extern PythonApi python;

// Find a libpython in the process, or load `library` (empty: there is none to load). Throws
// E_PYTHON if there is none, if it lacks a function or is of another minor version.
void load_python(const std::string& library);

// Holds the GIL, from any thread.
class Gil {
 public:
  Gil() : state_(python.PyGILState_Ensure()) {}
  ~Gil() { python.PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// Owns one reference; all of it under the GIL.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() {
    if (object_ != nullptr) python.Py_DecRef(object_);
  }
  PyObject* get() const { return object_; }
  PyObject* give() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// Turn the pending Python exception into an Error.
[[noreturn]] void throw_python_error();

// Raise this thread's last error in Python; returns null, for functions that Python calls.
PyObject* raise_last_error();

inline Ref checked(PyObject* owned) {
  if (owned == nullptr) throw_python_error();
  return Ref(owned);
}

inline Ref again(PyObject* borrowed) {
  python.Py_IncRef(borrowed);
  return Ref(borrowed);
}

inline Ref none() { return checked(python.Py_BuildValue("")); }
inline Ref to_python(long long value) { return checked(python.PyLong_FromLongLong(value)); }
inline Ref to_python(int value) { return to_python(static_cast<long long>(value)); }
inline Ref to_python(double value) { return checked(python.PyFloat_FromDouble(value)); }
Ref to_python(const char* text);  // null: None; E_ARGUMENT if it is not UTF-8
inline Ref to_python(Ref&& value) { return std::move(value); }
inline Ref to_python(const Ref& value) { return again(value.get()); }

template <typename... Values>
Ref tuple_of(Values&&... values) {
  Ref result = checked(python.PyTuple_New(sizeof...(values)));
  Py_ssize_t at = 0;
  (python.PyTuple_SetItem(result.get(), at++, to_python(std::forward<Values>(values)).give()), ...);
  return result;
}

// A tuple with make(i) for i in 0..count.
template <typename Make>
Ref tuple_of_each(std::size_t count, Make&& make) {
  Ref result = checked(python.PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (std::size_t i = 0; i < count; ++i)
    python.PyTuple_SetItem(result.get(), static_cast<Py_ssize_t>(i), make(i).give());
  return result;
}

// Call a function of recallseg.runtime.services.c_interface.
Ref call_with(const char* function, const Ref& arguments);

template <typename... Values>
Ref call(const char* function, Values&&... values) {
  return call_with(function, tuple_of(std::forward<Values>(values)...));
}

// Reads a tuple's items in turn.
class Reader {
 public:
  explicit Reader(PyObject* tuple) : tuple_(tuple) {}
  std::size_t size() const;
  PyObject* next();  // borrowed
  std::string text();
  long long integer();
  double real();
  bool truth();

 private:
  PyObject* tuple_;
  Py_ssize_t at_ = 0;
};

std::string text_of(PyObject* object);

}  // namespace capi
