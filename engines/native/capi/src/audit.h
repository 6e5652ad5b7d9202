// An open audit log, which segmenters keep open.
#pragma once

#include "handles.h"
#include "python.h"

namespace capi {

class Audit final : public Object {
 public:
  static constexpr Kind kKind = Kind::kAudit;
  explicit Audit(Ref log) : object(std::move(log)) {}
  ~Audit() override {
    const Gil gil;
    object = Ref();
  }

  Ref object;  // recallseg.runtime.services.audit.AuditLog
};

}  // namespace capi
