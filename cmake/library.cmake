# The library's targets, all INTERFACE: headers, and for run-time dispatch a few sources that each program compiles once.
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

# Under g++ Highway 1.0.3 compiles all its aarch64 code for +crypto, so that a lambda given to map, which is compiled without, could not inline it.
# This takes Highway's run-time dispatch away, and with it that attribute; NEON is the only table there is.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  target_compile_definitions(tinyllama_headers INTERFACE TOOLCHAIN_MISS_SYS_AUXV_H)
endif()

# tinyllama::tinyllama: the same, with kernels for every instruction set, chosen at run time. Link it PRIVATE, and once a program.
add_library(tinyllama_tinyllama INTERFACE)
add_library(tinyllama::tinyllama ALIAS tinyllama_tinyllama)
set_target_properties(tinyllama_tinyllama PROPERTIES EXPORT_NAME tinyllama)
target_link_libraries(tinyllama_tinyllama INTERFACE tinyllama_headers)
target_compile_definitions(tinyllama_tinyllama INTERFACE TINYLLAMA_DISPATCH)
target_link_libraries(tinyllama_tinyllama INTERFACE hwy::hwy)

# tinyllama::training: the same, with training's kernels, a source of its own that programs which only generate do not compile.
add_library(tinyllama_training INTERFACE)
add_library(tinyllama::training ALIAS tinyllama_training)
set_target_properties(tinyllama_training PROPERTIES EXPORT_NAME training)
target_link_libraries(tinyllama_training INTERFACE tinyllama_tinyllama)

function(tinyllama_interface_sources target)
  foreach(source IN LISTS ARGN)
    target_sources(${target} INTERFACE
      $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include/tinyllama/${source}>
      $<INSTALL_INTERFACE:$<INSTALL_PREFIX>/${CMAKE_INSTALL_INCLUDEDIR}/tinyllama/${source}>)
  endforeach()
endfunction()
set(tinyllama_sources kernels/cpu/dispatch.cpp io/compiled.cpp generate/instances.cpp)
set(tinyllama_training_sources kernels/cpu/training_dispatch.cpp)
tinyllama_interface_sources(tinyllama_tinyllama ${tinyllama_sources})
tinyllama_interface_sources(tinyllama_training ${tinyllama_training_sources})

# tinyllama::mpi: tinyllama::training for programs that mpirun starts. Their project has find_package(MPI COMPONENTS CXX). The C++ bindings that MPI once had
# stay out.
add_library(tinyllama_mpi INTERFACE)
add_library(tinyllama::mpi ALIAS tinyllama_mpi)
set_target_properties(tinyllama_mpi PROPERTIES EXPORT_NAME mpi)
target_link_libraries(tinyllama_mpi INTERFACE tinyllama_training MPI::MPI_CXX)
set(tinyllama_mpi_definitions TINYLLAMA_MPI OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
target_compile_definitions(tinyllama_mpi INTERFACE ${tinyllama_mpi_definitions})

# tinyllama::cuda: tinyllama::tinyllama and the CUDA device, for units of either language. The kernels are a .cu source that each program compiles once:
# its project enables CUDA and has find_package(CUDAToolkit).
add_library(tinyllama_cuda INTERFACE)
add_library(tinyllama::cuda ALIAS tinyllama_cuda)
set_target_properties(tinyllama_cuda PROPERTIES EXPORT_NAME cuda)
target_link_libraries(tinyllama_cuda INTERFACE tinyllama_tinyllama CUDA::cudart_static CUDA::cublasLt)
target_compile_definitions(tinyllama_cuda INTERFACE TINYLLAMA_CUDA)
# CMake 3.25 does not know nvcc's C++20.
target_compile_options(tinyllama_cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
set(tinyllama_cuda_sources device/cuda.cu generate/cuda_instances.cpp)
tinyllama_interface_sources(tinyllama_cuda ${tinyllama_cuda_sources})

# tinyllama::cuda_training: both, with training's kernels on a card. cuDNN, where it is found at run time, computes attention.
add_library(tinyllama_cuda_training INTERFACE)
add_library(tinyllama::cuda_training ALIAS tinyllama_cuda_training)
set_target_properties(tinyllama_cuda_training PROPERTIES EXPORT_NAME cuda_training)
target_link_libraries(tinyllama_cuda_training INTERFACE tinyllama_cuda tinyllama_training ${CMAKE_DL_LIBS})
set(tinyllama_cuda_training_sources device/cuda_training.cu)
tinyllama_interface_sources(tinyllama_cuda_training ${tinyllama_cuda_training_sources})
