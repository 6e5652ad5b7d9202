# shellcheck shell=bash
# Sourced by the scripts that check the native code: build it with other flags, run its checks.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
RECALLSEG_PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
export RECALLSEG_PYTHON

# A library for the checks, made by the engine `fake`.
PYTHONPATH="${RECALLSEG_SITE_PACKAGES:-}${RECALLSEG_SITE_PACKAGES:+:}tests" "$RECALLSEG_PYTHON" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import cv2
from support.native import make_fake_library
from support.pictures import disc

from recallseg import Segmenter

# And a query, with the label map that it must get.
folder = Path(sys.argv[1])
query = disc(0.45).image
segmenter = Segmenter(make_fake_library(folder), k=2, engine="fake")
cv2.imwrite(str(folder / "query.pgm"), query)
cv2.imwrite(str(folder / "expected.pgm"), segmenter.segment(query).label_map)
PYTHON

# build_checks NAME FLAGS...
build_checks() {
  local name=$1 flags="${*:2}"
  for settings in "-S . -B $work/$name-build -DCMAKE_INSTALL_PREFIX=$work/$name \
      -DPython3_EXECUTABLE=$RECALLSEG_PYTHON -DRECALLSEG_BUILD_CAPI=ON" \
    "-S tests/integration/capi -B $work/$name-checks -DCMAKE_PREFIX_PATH=$work/$name"; do
    # shellcheck disable=SC2086
    cmake $settings -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_FLAGS="$flags" \
      -DCMAKE_CXX_FLAGS="$flags" >"$work/log" || { cat "$work/log"; return 1; }
    local folder=${settings#*-B }
    cmake --build "${folder%% *}" --parallel 2 >"$work/log" || { cat "$work/log"; return 1; }
    [[ $folder == *-checks* ]] || cmake --install "${folder%% *}" >"$work/log"
  done
}

# run_check BUILD NAME [WRAPPER...]
run_check() {
  "${@:3}" "$work/$1-checks/checks" "$2" "$work/library" "$work/scratch"
}

# run_alone BUILD NAME [WRAPPER...]: a check that changes its library, on a copy of its own.
run_alone() {
  rm -rf "$work/alone" && mkdir -p "$work/alone/scratch"
  cp -r "$work/library" "$work/bundle" "$work/alone"
  PYTHONPATH=${RECALLSEG_SITE_PACKAGES:-} \
    "$RECALLSEG_PYTHON" -m recallseg audit key "$work/alone/scratch/audit.key" >"$work/log"
  DAMAGE=$(ls "$work"/alone/library/memories/*.shard) \
    "${@:3}" "$work/$1-checks/checks" "$2" "$work/alone/library" "$work/alone/scratch"
}

# build_levels NAME COMPILER FLAGS...: sources for the levels of vector units that a compiler has, and
# what is linked with them. From the caller: program, folder, prefix, sources, levels, rest.
build_levels() {
  local name=$1 compiler=$2 flags=("${@:3}") objects=() level source
  local options=(-std=c++20 -O2 "$contract" -pthread "-I$folder")
  for level in baseline "${levels[@]}"; do
    case $level in
      baseline) ;;
      *) [[ $("$compiler" -dumpmachine) == x86_64* ]] || continue
        options+=("-D${prefix}_X86_LEVELS") flags=("${@:3}" "-march=x86-64-${level/vnni/v4}")
        [[ $level != vnni ]] || flags+=(-mavx512vnni) ;;
    esac
    for source in "${sources[@]}"; do
      objects+=("$work/$name-$source-$level.o")
      "$compiler" "${options[@]}" "${flags[@]}" "-D${prefix}_LEVEL=$level" -c "$folder/$source.cpp" \
        -o "$work/$name-$source-$level.o"
    done
  done
  "$compiler" "${options[@]}" "${@:3}" "${rest[@]}" "${objects[@]}" -o "$work/$name-$program"
}

# build_digest NAME COMPILER FLAGS...: the pixel kernels and their digest.
build_digest() {
  local program=digest folder=engines/native/pixels prefix=PIXELS sources=(rows) levels=(v3 v4)
  local contract=-ffp-contract=off
  local rest=("$folder"/{dispatch,order,resize}.cpp tests/integration/pixels/digest.cpp)
  build_levels "$@"
}

# build_operators NAME COMPILER FLAGS...: the operators' kernels and their checks.
build_operators() {
  local program=operators folder=engines/native/operators prefix=OPERATORS
  local sources=({exact,head,quantized}_kernels) levels=(v3 vnni) contract=-ffp-contract=fast
  local rest=("$folder"/{dispatch,exact,head,quantized_attention}.cpp
    tests/integration/operators/checks.cpp)
  build_levels "$@"
}
