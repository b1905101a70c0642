# One function makes every module alike: an OBJECT library that sees the floors below it.

add_library(attune_settings INTERFACE)
target_compile_features(attune_settings INTERFACE cxx_std_20)
target_include_directories(attune_settings INTERFACE
  ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/templates)
if(ATTUNE_SANITIZE)
  target_compile_options(attune_settings INTERFACE -fsanitize=${ATTUNE_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  target_link_options(attune_settings INTERFACE -fsanitize=${ATTUNE_SANITIZE})
endif()

add_library(attune_warnings INTERFACE)
target_compile_options(attune_warnings INTERFACE
  -Wall -Wextra -Wshadow
  -Wno-missing-field-initializers  # designated initialisers name what differs from the default
  $<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor -Woverloaded-virtual>
  $<$<BOOL:${ATTUNE_WERROR}>:-Werror>)

# attune_module(name SOURCES ... FLOORS ... [LIBRARIES ...])
function(attune_module name)
  cmake_parse_arguments(arg "" "" "SOURCES;FLOORS;LIBRARIES" ${ARGN})
  add_library(attune_${name} OBJECT ${arg_SOURCES})
  set_target_properties(attune_${name} PROPERTIES
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_link_libraries(attune_${name} PUBLIC attune_settings PRIVATE attune_warnings)
  target_link_libraries(attune_${name} PUBLIC ${arg_LIBRARIES})
  foreach(floor IN LISTS arg_FLOORS)
    target_link_libraries(attune_${name} PUBLIC attune_${floor})
  endforeach()
endfunction()

# attune_bundle(target modules...): collects the modules' objects into one target.
function(attune_bundle target)
  foreach(name IN LISTS ARGN)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:attune_${name}>)
  endforeach()
endfunction()
