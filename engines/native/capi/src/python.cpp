#include "python.h"

#include <dlfcn.h>

#include <cstring>

#include "interpreter.h"

namespace capi {

PythonApi python;

namespace {

const std::string kMinor =
    std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);

template <typename Function>
void find(void* library, const char* name, Function& target) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr)
    throw Error(RECALLSEG_E_PYTHON,
                std::string("the loaded libpython has no ") + name + ": it is damaged, or not one");
  static_assert(sizeof symbol == sizeof target, "functions and data have pointers of one size");
  std::memcpy(&target, &symbol, sizeof symbol);
}

std::string file_of(void* symbol) {
  Dl_info info{};
  return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

}  // namespace

void load_python(const std::string& library) {
  void* handle = RTLD_DEFAULT;
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized") == nullptr) {
    if (library.empty())
      throw Error(RECALLSEG_E_PYTHON,
                  "no libpython" + kMinor +
                      ".so was found beside the Python executable. Give its path in "
                      "recallseg_init_options.python_library or in RECALLSEG_PYTHON_LIBRARY; a "
                      "Python built without --enable-shared has none");
    // Extension modules such as numpy's find Python's symbols in the global scope.
    handle = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) {
      const char* why = dlerror();
      throw Error(RECALLSEG_E_PYTHON, "libpython cannot be loaded: " +
                                          std::string(why == nullptr ? library : why));
    }
  }
  PythonApi found;
#define CAPI_FIND(name) find(handle, #name, found.name);
  CAPI_PYTHON_FUNCTIONS(CAPI_FIND)
#undef CAPI_FIND
  void* symbol = nullptr;
  std::memcpy(&symbol, &found.Py_GetVersion, sizeof symbol);
  found.file = file_of(symbol);
  const std::string version = found.Py_GetVersion();
  if (version.compare(0, kMinor.size() + 1, kMinor + ".") != 0)
    throw Error(RECALLSEG_E_PYTHON, "librecallseg was built for Python " + kMinor + ", " +
                                        found.file + " is " +
                                        version.substr(0, version.find(' ')) +
                                        ". Build it with that Python's headers, or name another");
  python = found;
}

Ref to_python(const char* text) {
  if (text == nullptr) return none();
  PyObject* object =
      python.PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(std::strlen(text)), nullptr);
  if (object == nullptr) {
    python.PyErr_Clear();
    refuse("a text is not valid UTF-8");
  }
  return Ref(object);
}

std::string text_of(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = python.PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw_python_error();
  return std::string(text, static_cast<std::size_t>(size));
}

void throw_python_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  python.PyErr_Fetch(&type, &value, &trace);
  python.PyErr_NormalizeException(&type, &value, &trace);
  const Ref owned_type(type), owned_value(value), owned_trace(trace);
  if (owned_value && embedding()) {
    Ref function(python.PyObject_GetAttrString(embedding().get(), "status_of"));
    Ref answer(function ? python.PyObject_CallObject(function.get(),
                                                     tuple_of(again(value)).get())
                        : nullptr);
    if (answer) {
      Reader reader(answer.get());
      const auto status = static_cast<recallseg_status>(reader.integer());
      throw Error(status, reader.text());
    }
    python.PyErr_Clear();
  }
  std::string message = "Python raised an exception";
  Ref name(type == nullptr ? nullptr : python.PyObject_GetAttrString(type, "__name__"));
  if (name) message = text_of(name.get());
  Ref text_method(value == nullptr ? nullptr : python.PyObject_GetAttrString(value, "__str__"));
  Ref text(text_method ? python.PyObject_CallObject(text_method.get(), nullptr) : nullptr);
  if (text) message += ": " + text_of(text.get());
  python.PyErr_Clear();
  // Before the package is there to tell; the loader's own words came as ImportError.
  for (const char* sign : {"MemoryError", "annot allocate memory", "failed to map segment"})
    if (message.find(sign) != std::string::npos) throw Error(RECALLSEG_E_MEMORY, message);
  throw Error(embedding() ? RECALLSEG_E_INTERNAL : RECALLSEG_E_PYTHON, message);
}

PyObject* raise_last_error() {
  const Ref builtins(python.PyImport_ImportModule("builtins"));
  const Ref kind(python.PyObject_GetAttrString(builtins.get(), "RuntimeError"));
  python.PyErr_SetString(kind.get(), recallseg_last_error());
  return nullptr;
}

Ref call_with(const char* function, const Ref& arguments) {
  const Ref callable = checked(python.PyObject_GetAttrString(embedding().get(), function));
  Ref answer = checked(python.PyObject_CallObject(callable.get(), arguments.get()));
  come_first_at_exit();
  return answer;
}

std::size_t Reader::size() const {
  const Py_ssize_t size = python.PyTuple_Size(tuple_);
  if (size < 0) throw_python_error();
  return static_cast<std::size_t>(size);
}

PyObject* Reader::next() {
  PyObject* item = python.PyTuple_GetItem(tuple_, at_++);
  if (item == nullptr) throw_python_error();
  return item;
}

std::string Reader::text() { return text_of(next()); }

long long Reader::integer() {
  PyObject* item = next();
  const long long value = python.PyLong_AsLongLong(item);
  return value;
}

double Reader::real() { return python.PyFloat_AsDouble(next()); }

bool Reader::truth() { return python.PyObject_IsTrue(next()) == 1; }

}  // namespace capi
