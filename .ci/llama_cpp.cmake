# How llama.cpp is compiled for a development environment: included by cmake after each project() of llama-cpp-python
# (CMAKE_PROJECT_INCLUDE, set by .ci/setup.sh). The first call comes from the outermost project, whose end is the end of all of them.
#
# Several sources are compiled as one (a unity build), except those that do not allow it. ggml, which computes, is optimised as always. llama
# and mtmd, which read files and build graphs, take two thirds of the time and are optimised less: a test job takes no longer for it.
if(NOT DEFINED RECONCILE_INCLUDED)
  set(RECONCILE_INCLUDED TRUE)
  set(CMAKE_UNITY_BUILD ON)
  set(CMAKE_UNITY_BUILD_BATCH_SIZE 12)
  find_program(RECONCILE_CCACHE NAMES ccache sccache)
  if(RECONCILE_CCACHE)
    set(CMAKE_C_COMPILER_LAUNCHER ${RECONCILE_CCACHE})
    set(CMAKE_CXX_COMPILER_LAUNCHER ${RECONCILE_CCACHE})
  endif()
  function(reconcile_adjust)
    if(TARGET ggml-cpu) # two of its sources define one function
      set_target_properties(ggml-cpu PROPERTIES UNITY_BUILD OFF)
    endif()
    if(TARGET mtmd) # these refuse to see the headers of the others
      get_target_property(folder mtmd SOURCE_DIR)
      file(GLOB helpers ${folder}/mtmd-helper*.cpp)
      set_source_files_properties(${helpers} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    endif()
    foreach(target llama mtmd)
      if(TARGET ${target})
        target_compile_options(${target} PRIVATE -O1)
      endif()
    endforeach()
  endfunction()
  cmake_language(DEFER CALL reconcile_adjust)
endif()
if(PROJECT_NAME STREQUAL "llama.cpp")
  set(LLAMA_BUILD_COMMON OFF) # what its own programs share, and nothing of Python's
endif()
