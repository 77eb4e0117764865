# How a module, a program and a test are declared. Sources are listed by name, never globbed.

add_library(holdfast_options INTERFACE)
target_include_directories(holdfast_options INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(holdfast_options INTERFACE
  -Wall -Wextra -Wshadow -Wconversion -Wnon-virtual-dtor -Woverloaded-virtual -Wold-style-cast -Wimplicit-fallthrough
  -fno-omit-frame-pointer
  $<$<CXX_COMPILER_ID:Clang>:-Wthread-safety>
  $<$<BOOL:${HOLDFAST_WERROR}>:-Werror>)
if(HOLDFAST_SANITIZE)
  string(REPLACE ";" "," HOLDFAST_SANITIZE_LIST "${HOLDFAST_SANITIZE}")
  target_compile_options(holdfast_options INTERFACE -fsanitize=${HOLDFAST_SANITIZE_LIST} -fno-sanitize-recover=all)
  target_link_options(holdfast_options INTERFACE -fsanitize=${HOLDFAST_SANITIZE_LIST})
  target_compile_definitions(holdfast_options INTERFACE HOLDFAST_SANITIZED=1)
  # With its instrumentation g++ 12 takes KJ's and the standard library's optionals for uninitialized.
  target_compile_options(holdfast_options INTERFACE -Wno-maybe-uninitialized)
endif()
# What a sanitizer reports in any process of a test fails it, and nothing runs at its usual speed.
set(HOLDFAST_TEST_LAUNCHER "")
set(HOLDFAST_TIMEOUT_FACTOR 1)
if(HOLDFAST_SANITIZE AND NOT HOLDFAST_FUZZ)
  find_package(Python3 3.9 REQUIRED COMPONENTS Interpreter)
  set(HOLDFAST_TEST_LAUNCHER ${Python3_EXECUTABLE} -u ${CMAKE_SOURCE_DIR}/tests/support/sanitized_run.py)
  set(HOLDFAST_TIMEOUT_FACTOR 4)
endif()
set(HOLDFAST_EVERY_PROGRAM "")
if(HOLDFAST_SANITIZE STREQUAL "thread")
  add_library(hf_libc_backtrace OBJECT ${CMAKE_SOURCE_DIR}/common/libc_backtrace.cc)
  target_link_libraries(hf_libc_backtrace PRIVATE holdfast_options)
  set(HOLDFAST_EVERY_PROGRAM $<TARGET_OBJECTS:hf_libc_backtrace>)
endif()
if(HOLDFAST_FUZZ)  # the libraries must be instrumented too, or the fuzzer is blind
  target_compile_options(holdfast_options INTERFACE -fsanitize=fuzzer-no-link)
endif()
find_program(HOLDFAST_MOLD mold)
if(HOLDFAST_MOLD)
  target_link_options(holdfast_options INTERFACE -fuse-ld=mold)
endif()
find_program(HOLDFAST_CCACHE ccache)
if(HOLDFAST_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${HOLDFAST_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${HOLDFAST_CCACHE})
endif()

# holdfast_library(name SRCS a.cc ... DEPS other_modules dep_x ...)
function(holdfast_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS} PRIVATE holdfast_options)
endfunction()

# holdfast_program(name SRCS ... DEPS ...): an executable in build/<preset>/bin
function(holdfast_program name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS} ${HOLDFAST_EVERY_PROGRAM})
  target_link_libraries(${name} PRIVATE holdfast_options ${ARG_DEPS})
  if(NOT HOLDFAST_SANITIZE)
    target_link_options(${name} PRIVATE -static-libstdc++ -static-libgcc)
  endif()
endfunction()

# holdfast_test(name LABEL unit SRCS ... DEPS ... [TIMEOUT seconds] [SERIAL]): one ctest entry for a GoogleTest program.
# Kinds (labels) are listed in docs/TESTING.md. A test gets the build's bin folder in HOLDFAST_BIN and the source
# folder in HOLDFAST_SOURCE.
function(holdfast_test name)
  cmake_parse_arguments(ARG "SERIAL" "LABEL;TIMEOUT" "SRCS;DEPS" ${ARGN})
  if(NOT ARG_LABEL)
    message(FATAL_ERROR "holdfast_test(${name}): LABEL is missing")
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SRCS} ${HOLDFAST_EVERY_PROGRAM})
  target_link_libraries(${name} PRIVATE holdfast_options holdfast_test_main ${ARG_DEPS} dep_gtest)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * ${HOLDFAST_TIMEOUT_FACTOR}")
  add_test(NAME ${name} COMMAND ${HOLDFAST_TEST_LAUNCHER} $<TARGET_FILE:${name}>)
  set_tests_properties(${name} PROPERTIES LABELS ${ARG_LABEL} TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "HOLDFAST_BIN=${CMAKE_BINARY_DIR}/bin;HOLDFAST_SOURCE=${CMAKE_SOURCE_DIR}")
  if(ARG_SERIAL)
    set_tests_properties(${name} PROPERTIES RUN_SERIAL ON)
  endif()
endfunction()

# holdfast_fuzz(name SRCS ... DEPS ...): with HOLDFAST_FUZZ a libFuzzer program; always a test that replays the seeds in
# tests/fuzz/corpus/<name> through the same entry point.
function(holdfast_fuzz name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE holdfast_options ${ARG_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz)
  set(corpus ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${name})
  if(HOLDFAST_FUZZ)
    target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    add_test(NAME ${name} COMMAND ${name} -max_total_time=20 -rss_limit_mb=4096 ${corpus})
  else()
    target_sources(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.cc)
    add_test(NAME ${name} COMMAND ${HOLDFAST_TEST_LAUNCHER} $<TARGET_FILE:${name}> ${corpus})
  endif()
  set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT 120)
endfunction()
