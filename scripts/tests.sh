# shellcheck shell=bash
# Sourced by the scripts that run tests.

# run_tests FOLDER...: a worker for each core, and then what must have the machine to itself.
run_tests() {
  local tests="not gpu and not slow" alone
  python -m pytest -q -n auto --maxprocesses 4 --dist loadscope -m "$tests and not alone" "$@"
  mapfile -t alone < <(grep -rl --include='test_*.py' 'mark\.alone' "$@")
  ((${#alone[@]} == 0)) || python -m pytest -q -m "$tests and alone" "${alone[@]}"
}
