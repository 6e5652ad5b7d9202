// What a library holds: exemplars listed, erased, retired, and every byte compared with its digest.
#include <deque>

#include "interpreter.h"
#include "library.h"
#include "progress.h"

namespace capi {
namespace {

// Texts and the array of pointers to them that C reads.
struct Texts {
  std::vector<std::string> texts;
  std::vector<const char*> pointers;

  explicit Texts(PyObject* tuple) {
    Reader reader(tuple);
    for (std::size_t left = reader.size(); left > 0; --left) texts.push_back(reader.text());
    for (const std::string& text : texts) pointers.push_back(text.c_str());
  }
  Texts(const Texts&) = delete;
};

struct Listed {
  std::string key, created, content;
  Texts structures, absent, tags;  // tags: name, value, name, value
  std::vector<recallseg_tag> pairs;
  recallseg_listed answer = RECALLSEG_LISTED_INIT;

  explicit Listed(Reader reader)
      : key(reader.text()),
        created(reader.text()),
        content(reader.text()),
        structures(reader.next()),
        absent(reader.next()),
        tags(reader.next()) {
    for (std::size_t i = 0; i + 1 < tags.pointers.size(); i += 2)
      pairs.push_back({tags.pointers[i], tags.pointers[i + 1]});
    answer.key = key.c_str();
    answer.created = created.c_str();
    answer.content = content.c_str();
    answer.structures = structures.pointers.data();
    answer.structure_count = structures.pointers.size();
    answer.absent = absent.pointers.data();
    answer.absent_count = absent.pointers.size();
    answer.tags = pairs.data();
    answer.tag_count = pairs.size();
    answer.rows = reader.integer();
    answer.columns = reader.integer();
    answer.has_source = reader.truth() ? 1 : 0;
    answer.retired = reader.truth() ? 1 : 0;
  }
};

class List final : public Object {
 public:
  static constexpr Kind kKind = Kind::kList;
  std::deque<Listed> exemplars;  // none moves: they point into themselves
};

void change(const char* function, recallseg_library* library, const char* key) {
  require_ready();
  const auto self = get<Library>(library);
  required_text(key, "key");
  const Gil gil;
  call(function, self->object, key);
}

}  // namespace
}  // namespace capi

using namespace capi;

extern "C" {

recallseg_status recallseg_library_remove(recallseg_library* library, const char* key) {
  return guarded([&] { change("remove", library, key); });
}

recallseg_status recallseg_library_retire(recallseg_library* library, const char* key,
                                          int32_t retired) {
  return guarded([&] { change(retired != 0 ? "retire" : "reinstate", library, key); });
}

recallseg_status recallseg_library_list(recallseg_library* library, recallseg_list** list) {
  return guarded([&] {
    required(list, "list") = nullptr;
    require_ready();
    const auto self = get<Library>(library);
    const auto found = std::make_shared<List>();
    {
      const Gil gil;
      const Ref exemplars = call("list_exemplars", self->object);
      Reader reader(exemplars.get());
      for (std::size_t left = reader.size(); left > 0; --left)
        found->exemplars.emplace_back(Reader(reader.next()));
    }
    publish(found, list);
  });
}

recallseg_status recallseg_list_count(recallseg_list* list, size_t* count) {
  return guarded([&] {
    require_ready();
    required(count, "count") = get<List>(list)->exemplars.size();
  });
}

recallseg_status recallseg_list_exemplar(recallseg_list* list, size_t index,
                                         recallseg_listed* exemplar) {
  return guarded([&] {
    require_ready();
    const auto self = get<List>(list);
    if (index >= self->exemplars.size())
      refuse("there are " + std::to_string(self->exemplars.size()) + " exemplars, not one " +
             std::to_string(index));
    write_struct(self->exemplars[index].answer, exemplar, "exemplar");
  });
}

recallseg_status recallseg_list_close(recallseg_list* list) {
  return guarded([&] {
    require_ready();
    close_handle<List>(list);
  });
}

recallseg_status recallseg_library_verify(recallseg_library* library,
                                          recallseg_progress_callback progress, void* user,
                                          recallseg_verification* verification) {
  return guarded([&] {
    require_ready();
    const auto self = get<Library>(library);
    recallseg_verification answer = RECALLSEG_VERIFICATION_INIT;
    if (verification != nullptr) write_struct(answer, verification, "verification");
    const Progress to{progress, user};
    std::string problems;
    {
      const Gil gil;
      const Ref report = call("verify", self->object, report_function(), address_of(to));
      Reader reader(report.get());
      for (uint64_t* count : {&answer.exemplars, &answer.memories, &answer.sources,
                              &answer.indexes, &answer.problem_count})
        *count = static_cast<std::uint64_t>(reader.integer());
      problems = reader.text();
    }
    {
      const std::lock_guard<std::mutex> lock(self->mutex);
      self->problems = problems;
      answer.problems = self->problems.c_str();
      if (verification != nullptr) write_struct(answer, verification, "verification");
    }
    if (answer.problem_count > 0)
      throw Error(RECALLSEG_E_LIBRARY_CORRUPT,
                  std::to_string(answer.problem_count) + " problems: " + problems);
  });
}
}
