# Every dependency comes from Debian 12's packages and is linked statically, except libc, OpenSSL, libcurl,
# libsystemd and libunwind: an `apt upgrade` that replaces a library under a running worker must not stop its successor from
# starting (docs/HANDOVER.md). Each dep_* target below is the one name by which a module may ask for a library;
# tests/lint checks which module does.

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)

# The static archive of a library; a missing package is an error that names it.
function(holdfast_archive out name package)
  find_library(HOLDFAST_ARCHIVE_${name} NAMES lib${name}.a)
  if(NOT HOLDFAST_ARCHIVE_${name})
    message(FATAL_ERROR "lib${name}.a not found: install Debian's ${package} (scripts/install-deps does it)")
  endif()
  set(${out} ${HOLDFAST_ARCHIVE_${name}} PARENT_SCOPE)
endfunction()

# dep_<name>: static archives in one group, because several of them need each other.
function(holdfast_static_dependency name)
  cmake_parse_arguments(ARG "" "PACKAGE" "ARCHIVES;DEPS" ${ARGN})
  set(files)
  foreach(archive IN LISTS ARG_ARCHIVES)
    holdfast_archive(file ${archive} ${ARG_PACKAGE})
    list(APPEND files ${file})
  endforeach()
  add_library(dep_${name} INTERFACE)
  list(JOIN files "," files)
  target_link_libraries(dep_${name} INTERFACE "$<LINK_GROUP:RESCAN,${files}>" ${ARG_DEPS} Threads::Threads)
endfunction()

# abseil is some eighty archives; the linker takes what is needed.
file(GLOB HOLDFAST_ABSL_ARCHIVES /usr/lib/*/libabsl_*.a)
if(NOT HOLDFAST_ABSL_ARCHIVES)
  message(FATAL_ERROR "libabsl_*.a not found: install Debian's libabsl-dev (scripts/install-deps does it)")
endif()
# Test-only helpers that drag gtest in; nothing of ours uses them.
list(FILTER HOLDFAST_ABSL_ARCHIVES EXCLUDE REGEX "scoped_mock_log|test_util|testing")
add_library(dep_absl INTERFACE)
list(JOIN HOLDFAST_ABSL_ARCHIVES "," HOLDFAST_ABSL_JOINED)
target_link_libraries(dep_absl INTERFACE "$<LINK_GROUP:RESCAN,${HOLDFAST_ABSL_JOINED}>" rt Threads::Threads)

# libunwind (glog's stack traces) stays shared: Debian's archive of it is not position-independent.
holdfast_static_dependency(glog PACKAGE "libgoogle-glog-dev, libgflags-dev" ARCHIVES glog gflags DEPS unwind)
holdfast_static_dependency(capnp PACKAGE libcapnp-dev ARCHIVES capnp-rpc capnp kj-async kj)
holdfast_static_dependency(kj_http PACKAGE libcapnp-dev ARCHIVES kj-http kj-async kj z)
holdfast_static_dependency(protobuf PACKAGE libprotobuf-dev ARCHIVES protobuf z)
holdfast_static_dependency(leveldb PACKAGE "libleveldb-dev, libsnappy-dev" ARCHIVES leveldb snappy)
holdfast_static_dependency(fuse3 PACKAGE libfuse3-dev ARCHIVES fuse3 DEPS dl)
target_compile_definitions(dep_fuse3 INTERFACE FUSE_USE_VERSION=314 _FILE_OFFSET_BITS=64)
target_include_directories(dep_fuse3 SYSTEM INTERFACE /usr/include/fuse3)
holdfast_static_dependency(compression PACKAGE "zlib1g-dev, libdeflate-dev, libzstd-dev" ARCHIVES z deflate zstd)
holdfast_static_dependency(re2 PACKAGE libre2-dev ARCHIVES re2)
holdfast_static_dependency(gtest PACKAGE "libgtest-dev, libgmock-dev" ARCHIVES gtest gmock)

# Shared on purpose: security updates of OpenSSL and libcurl must reach the worker without a rebuild. libcurl is not even linked,
# but loaded when it is first needed (worker/fetch/libcurl.h): only its header is wanted here.
find_package(OpenSSL REQUIRED)
add_library(dep_crypto INTERFACE)
target_link_libraries(dep_crypto INTERFACE OpenSSL::Crypto)
find_package(CURL REQUIRED)
add_library(dep_curl INTERFACE)
target_include_directories(dep_curl SYSTEM INTERFACE ${CURL_INCLUDE_DIRS})
target_link_libraries(dep_curl INTERFACE ${CMAKE_DL_LIBS})
pkg_check_modules(SYSTEMD REQUIRED IMPORTED_TARGET libsystemd)
add_library(dep_systemd INTERFACE)
target_link_libraries(dep_systemd INTERFACE PkgConfig::SYSTEMD)

holdfast_static_dependency(grpc PACKAGE "libgrpc++-dev, libc-ares-dev"
  ARCHIVES grpc++ grpc gpr upb address_sorting cares re2 z DEPS dep_protobuf dep_absl OpenSSL::SSL OpenSSL::Crypto)

# Header-only.
add_library(dep_json INTERFACE)
add_library(dep_toml INTERFACE)
add_library(dep_cli11 INTERFACE)

find_program(HOLDFAST_PROTOC protoc REQUIRED)
find_program(HOLDFAST_GRPC_PLUGIN grpc_cpp_plugin REQUIRED)
find_program(HOLDFAST_CAPNP capnp REQUIRED)
find_program(HOLDFAST_CAPNPC_CXX capnpc-c++ REQUIRED)
