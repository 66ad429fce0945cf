# Installs the headers, the dispatch source and the config package; nothing in it names this machine.
include(CMakePackageConfigHelpers)
set(config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/tinyllama")

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/tinyllama DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.h" PATTERN "*.cuh" PATTERN "*.cpp" PATTERN "*.cu")
install(TARGETS tinyllama_headers tinyllama_tinyllama tinyllama_training tinyllama_mpi tinyllama_cuda tinyllama_cuda_training EXPORT tinyllama-targets)
install(EXPORT tinyllama-targets NAMESPACE tinyllama:: DESTINATION ${config_dir})

configure_package_config_file(cmake/tinyllama-config.cmake.in "${PROJECT_BINARY_DIR}/tinyllama-config.cmake" INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file("${PROJECT_BINARY_DIR}/tinyllama-config-version.cmake" COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/tinyllama-config.cmake" "${PROJECT_BINARY_DIR}/tinyllama-config-version.cmake"
  cmake/tinyllama-dependencies.cmake DESTINATION ${config_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/tinyllama)
