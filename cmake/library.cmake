# The library's two targets. Both are INTERFACE: headers, and for run-time dispatch two sources that each program compiles once.
include(GNUInstallDirs)

# tinyllama::headers: the kernels are compiled for the instruction set of the unit's own -m flags; nothing to link but threads.
add_library(tinyllama_headers INTERFACE)
add_library(tinyllama::headers ALIAS tinyllama_headers)
set_target_properties(tinyllama_headers PROPERTIES EXPORT_NAME headers)
target_compile_features(tinyllama_headers INTERFACE cxx_std_20)
target_include_directories(tinyllama_headers INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(tinyllama_headers INTERFACE Threads::Threads nlohmann_json::nlohmann_json)
# Highway's headers without its library: only run-time dispatch calls into it. The folders by value, since an imported target that is
# found here is not visible to a project that has us by add_subdirectory.
get_target_property(hwy_include_dirs hwy::hwy INTERFACE_INCLUDE_DIRECTORIES)
target_include_directories(tinyllama_headers SYSTEM INTERFACE
  "$<BUILD_INTERFACE:${hwy_include_dirs}>" $<INSTALL_INTERFACE:$<TARGET_PROPERTY:hwy::hwy,INTERFACE_INCLUDE_DIRECTORIES>>)

# tinyllama::tinyllama: the same, with kernels for every instruction set, chosen at run time. Link it PRIVATE, and once a program.
add_library(tinyllama_tinyllama INTERFACE)
add_library(tinyllama::tinyllama ALIAS tinyllama_tinyllama)
set_target_properties(tinyllama_tinyllama PROPERTIES EXPORT_NAME tinyllama)
target_link_libraries(tinyllama_tinyllama INTERFACE tinyllama_headers)
target_compile_definitions(tinyllama_tinyllama INTERFACE TINYLLAMA_DISPATCH)
target_link_libraries(tinyllama_tinyllama INTERFACE hwy::hwy)
set(tinyllama_sources kernels/cpu/dispatch.cpp io/compiled.cpp)
foreach(source IN LISTS tinyllama_sources)
  target_sources(tinyllama_tinyllama INTERFACE
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include/tinyllama/${source}>
    $<INSTALL_INTERFACE:$<INSTALL_PREFIX>/${CMAKE_INSTALL_INCLUDEDIR}/tinyllama/${source}>)
endforeach()

# CUDA's place: tinyllama::cuda = headers + the CUDA runtime, behind an option TINYLLAMA_CUDA.
