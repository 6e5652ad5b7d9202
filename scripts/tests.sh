# shellcheck shell=bash
# Sourced by the scripts that run tests.

# run_tests PYTEST-ARGUMENTS...: a worker for each core, and then what must have the machine to itself.
run_tests() {
  local tests="not gpu and not slow" status=0
  python -m pytest -q -n auto --maxprocesses 4 --dist loadscope -m "$tests and not alone" "$@"
  python -m pytest -q -m "$tests and alone" "$@" || status=$?
  ((status == 0 || status == 5)) # 5: there are none
}
