#include "audit.h"

#include "interpreter.h"

using namespace capi;

extern "C" {

recallseg_status recallseg_audit_open(const char* file, const recallseg_audit_options* options,
                                      recallseg_audit** audit) {
  return guarded([&] {
    required(audit, "audit") = nullptr;
    require_ready();
    required_text(file, "file");
    recallseg_audit_options chosen = RECALLSEG_AUDIT_OPTIONS_INIT;
    if (options != nullptr) chosen = read_struct(options, "options");
    std::shared_ptr<Audit> opened;
    {
      const Gil gil;
      opened = std::make_shared<Audit>(call("open_audit", file, text_or(chosen.key, nullptr),
                                            text_or(chosen.head, nullptr)));
    }
    publish(std::move(opened), audit);
  });
}

recallseg_status recallseg_audit_close(recallseg_audit* audit) {
  return guarded([&] {
    require_ready();
    close_handle<Audit>(audit);
  });
}
}
