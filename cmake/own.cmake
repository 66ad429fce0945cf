# What our own programs share: where they go, their warnings, and run-time dispatch compiled once for all of them.
if(PROJECT_IS_TOP_LEVEL)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release)
  endif()
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
  set(CMAKE_CXX_EXTENSIONS OFF)
endif()

add_library(tinyllama_warnings INTERFACE)
target_compile_options(tinyllama_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow $<$<BOOL:${TINYLLAMA_WERROR}>:-Werror>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # g++ 12 sees overlapping copies in "literal" + std::string (GCC bug 105651).
  target_compile_options(tinyllama_warnings INTERFACE -Wno-restrict)
endif()

# A user's program compiles these sources itself; ours are some 30, so here they are a library.
add_library(tinyllama_own STATIC EXCLUDE_FROM_ALL)
foreach(source IN LISTS tinyllama_sources)
  target_sources(tinyllama_own PRIVATE ${PROJECT_SOURCE_DIR}/include/tinyllama/${source})
endforeach()
target_compile_definitions(tinyllama_own PUBLIC TINYLLAMA_DISPATCH)
target_link_libraries(tinyllama_own PUBLIC tinyllama_headers hwy::hwy PRIVATE tinyllama_warnings)

# tinyllama_program(NAME SOURCES... [STATIC_DISPATCH] [NATIVE] [PACKAGES targets...]); targets that were not found are left out.
function(tinyllama_program name)
  cmake_parse_arguments(ARG "STATIC_DISPATCH;NATIVE" "" "PACKAGES" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE tinyllama_warnings)
  if(ARG_STATIC_DISPATCH)
    target_link_libraries(${name} PRIVATE tinyllama_headers)
  else()
    target_link_libraries(${name} PRIVATE tinyllama_own)
  endif()
  if(ARG_NATIVE AND tinyllama_march_native)
    target_compile_options(${name} PRIVATE -march=native)
  endif()
  foreach(package IN LISTS ARG_PACKAGES)
    if(TARGET ${package})
      target_link_libraries(${name} PRIVATE ${package})
    endif()
  endforeach()
endfunction()

include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-march=native tinyllama_march_native)

# Packages that only our programs use.
find_package(CLI11 QUIET CONFIG)
find_package(xtensor QUIET CONFIG)
