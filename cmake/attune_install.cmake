# Install rules: the library, its headers, the plugin beside it, the command, and a package file for find_package(attune).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS attune EXPORT attune_targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/attune DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(TARGETS attune_command RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
if(NOT CMAKE_CROSSCOMPILING)
  set(printed "${PROJECT_BINARY_DIR}/tools/printed")
  install(FILES "${printed}/attune" DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
  install(FILES "${printed}/_attune" DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/site-functions)
  install(FILES "${printed}/attune.fish" DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
  install(FILES "${printed}/attune.1" DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
endif()
install(TARGETS attune_compile RUNTIME DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(ATTUNE_HAVE_LLVM)
  install(TARGETS attune_clang LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
install(EXPORT attune_targets NAMESPACE attune:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/attune FILE attune-targets.cmake)
file(WRITE "${PROJECT_BINARY_DIR}/attune-config.cmake" "include(\"\${CMAKE_CURRENT_LIST_DIR}/attune-targets.cmake\")\n")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/attune-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/attune-config.cmake" "${PROJECT_BINARY_DIR}/attune-config-version.cmake"
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/attune)
