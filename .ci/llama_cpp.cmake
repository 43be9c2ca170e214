# How llama.cpp is compiled for a development environment: included by cmake after each project() of llama-cpp-python
# (CMAKE_PROJECT_INCLUDE, set by .ci/setup.sh). The first call comes from the outermost project, whose end is the end of all of them.
#
# Several sources are compiled as one (a unity build), but those of the processor's backend, of which two define one function. What computes
# (ggml) is optimised as always; what reads files and builds graphs (llama, mtmd) takes two thirds of the time and is optimised less: a test
# job of a small model does not notice.
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
    foreach(target ggml-cpu)
      if(TARGET ${target})
        set_target_properties(${target} PROPERTIES UNITY_BUILD OFF)
      endif()
    endforeach()
    foreach(target llama mtmd)
      if(TARGET ${target})
        target_compile_options(${target} PRIVATE -O1)
      endif()
    endforeach()
  endfunction()
  cmake_language(DEFER CALL reconcile_adjust)
endif()
