// A hostile, forgetful and busy caller of librecallseg: checks NAME [LIBRARY] [FOLDER].
// LIBRARY is one that the engine "fake" made and whose two structures are disc and core.
#include "checks.h"

#include <map>

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks = {
      {"no_python", no_python}, {"hostile", hostile},     {"layouts", layouts},
      {"deadline", deadline},   {"threads", threads},     {"memory", memory},
      {"forked", forked},       {"signals", signals},     {"logging", logging},
      {"locked", locked},       {"exemplars", exemplars}, {"info", info},
      {"starts", starts},       {"interrupted", interrupted}, {"streams", streams},     {"wrapper", wrapper},   {"calibrates", calibrates},
#if RECALLSEG_ABI_VERSION >= 2u
      {"lists", lists}, {"verifies", verifies}, {"cancels", cancels}, {"audits", audits},
      {"schedules", schedules}, {"sessions_log", sessions_log},
#endif
      {"exits_in_a_frame", exits_in_a_frame}, {"exits_in_calls", exits_in_calls},
      {"exits_in_a_callback", exits_in_a_callback}};
  const auto found = argc > 1 ? checks.find(argv[1]) : checks.end();
  if (found == checks.end()) return 2;
  if (argc > 2) library_folder = argv[2];
  if (argc > 3) scratch_folder = argv[3];
  found->second();
  std::printf("%s: done\n", argv[1]);
  return 0;
}
