# Sources compiled for each level of vector units; the best one is chosen when loaded.
# add_level(PREFIX SOURCES LEVEL FLAGS...) adds the objects to the interface library PREFIX_levels,
# and defines PREFIX_LEVEL (in capitals) as the level's name.
function(add_level prefix sources level)
  if(NOT TARGET ${prefix}_levels)
    add_library(${prefix}_levels INTERFACE)
  endif()
  string(TOUPPER ${prefix} capitals)
  set(target ${prefix}_${level})
  add_library(${target} OBJECT ${sources})
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON
    CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden)
  target_compile_definitions(${target} PRIVATE ${capitals}_LEVEL=${level})
  target_compile_options(${target} PRIVATE -Wshadow -Wconversion ${ARGN})
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)  # its own AVX-512 headers, GCC bug 105593
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
  endif()
  target_sources(${prefix}_levels INTERFACE $<TARGET_OBJECTS:${target}>)
endfunction()
