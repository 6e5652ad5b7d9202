# shellcheck shell=bash
# Sourced by the scripts that check.

# check_style: format, and lint of Python and of shell scripts.
check_style() {
  local shell
  ruff format --check .
  ruff check .
  mapfile -t shell < <(grep -lE '^#!.*\b(ba)?sh$' .ci/* scripts/* 2>/dev/null)
  shellcheck --external-sources "${shell[@]}" scripts/*.sh
}

# memory_left: print how many MiB this process may still take.
memory_left() {
  local free limit
  free=$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)
  [[ $limit == max ]] || free=$((limit >> 20 < free ? limit >> 20 : free))
  echo "$free"
}

# memory_folder: make a folder in memory and print its name; fail where there is not enough of it, or
# where nothing could be run from it.
memory_folder() {
  local folder
  (($(df --output=avail --block-size=1M /dev/shm | tail -1) > 6000 && $(memory_left) > 12000)) || return 1
  folder=$(mktemp -d /dev/shm/recallseg.XXXXXX) || return 1
  if cp "$(type -P true)" "$folder/run" && "$folder/run"; then
    echo "$folder"
  else
    rm -rf "$folder"
    return 1
  fi
}

# run_tests FOLDER...: two workers for each core, and then what must have the machine to itself.
# At most four, and as many as find 3 GiB each: what PyTorch and sessions took is kept by a process.
#
# Much of a test's time is waiting: for a service, a process that starts, a browser, a sender's silence.
# So two share a core. One that has nothing left takes tests over from another. Most tests write a
# library, durably: on a disk that waits for its medium they would wait for a third of the time, so
# they write to memory.
run_tests() {
  export PYTHONDONTWRITEBYTECODE= # hundreds of processes would each compile what they import
  local tests="not gpu and not slow" alone folder place=() workers=$((2 * $(nproc))) room=$(($(memory_left) / 3072))
  if folder=$(memory_folder 2>/dev/null); then
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    export TMPDIR=$folder
    place=(--basetemp "$folder/tests") # short: names of sockets may have 107 bytes
  fi
  workers=$((workers < 4 ? workers : 4))
  workers=$((workers < room ? workers : room < 1 ? 1 : room))
  python -m pytest -q -n "$workers" --dist worksteal "${place[@]}" \
    -m "$tests and not alone" "$@"
  mapfile -t alone < <(grep -rl --include='test_*.py' 'mark\.alone' "$@")
  ((${#alone[@]} == 0)) || python -m pytest -q "${place[@]}" -m "$tests and alone" "${alone[@]}"
}
