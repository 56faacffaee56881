# Owns the build of the CUDA backend: where nvcc is looked for, for which GPUs it compiles, and what is
# added to the library. Without an nvcc the library is built without this backend.
set(CUDA_FOUND OFF)
if(NOT CUDA STREQUAL "OFF" AND NOT SANITIZE AND NOT CMAKE_CROSSCOMPILING)
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
    if(NVCC)
      set(CMAKE_CUDA_COMPILER ${NVCC})
    endif()
  endif()
  # An nvcc that cannot compile, because it does not know this C++ compiler for example, counts as none.
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CUDA_FOUND ON)
  endif()
endif()
if(CUDA STREQUAL "ON" AND NOT CUDA_FOUND)
  message(FATAL_ERROR "CUDA=ON, but there is no nvcc that works: put it on PATH or set CUDA_HOME.")
endif()
if(NOT CUDA_FOUND)
  message(STATUS "jax_kvcache is built without its CUDA backend: no nvcc that works was found on PATH "
    "or in CUDA_HOME, or CUDA is OFF.")
  return()
endif()

# Real code for a card of each generation that this nvcc knows; it also runs on later cards of the same
# generation. Generations that nvcc does not know start from the PTX of the newest one.
set(CUDA_GENERATIONS 80 90 100 110 120)
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE CUDA_KNOWN)
set(CUDA_CODE)
foreach(generation ${CUDA_GENERATIONS})
  if(CUDA_KNOWN MATCHES "sm_${generation}[^0-9]")
    list(APPEND CUDA_CODE ${generation}-real)
    set(CUDA_NEWEST ${generation})
  endif()
endforeach()
if(NOT CUDA_CODE)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} compiles for none of sm_80 and newer, which need CUDA 11 or newer: set "
    "CUDA_HOME to such a toolkit, or build without it by -DCUDA=OFF.")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${CUDA_CODE} ${CUDA_NEWEST}-virtual
  CACHE STRING "What the CUDA kernels are compiled for")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "jax_kvcache is built with its CUDA backend, by ${CMAKE_CUDA_COMPILER} for "
  "${CMAKE_CUDA_ARCHITECTURES}.")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CUDA_HEAD_DIMS 64 80 96 112 128 192 256)  # for which attention's kernel is compiled

# Adds the handlers and the kernels to a library. The CUDA runtime is linked statically and looks for the
# driver when it is first used, so that the library loads on a machine without one.
function(add_cuda_backend library)
  target_sources(${library} PRIVATE cuda/decode_attention.cc cuda/dequant_rope_quant_kvcache.cc)
  add_cuda_kernel(${library} card cuda/card.cu)
  add_cuda_kernel(${library} dequant_rope_quant_kvcache cuda/dequant_rope_quant_kvcache_kernel.cu)
  add_cuda_kernel(${library} decode_attention_merge cuda/decode_attention_merge.cu)
  foreach(head_dim ${CUDA_HEAD_DIMS})
    add_cuda_kernel(${library} decode_attention_${head_dim} cuda/decode_attention_kernel_variant.cu)
    target_compile_definitions(cuda_decode_attention_${head_dim} PRIVATE JAX_KVCACHE_HEAD_DIM=${head_dim})
  endforeach()
  target_link_libraries(${library} PRIVATE cuda_plans CUDA::cudart_static)
  set_target_properties(${library} PROPERTIES LINKER_LANGUAGE CXX)
endfunction()

function(add_cuda_kernel library name source)
  add_library(cuda_${name} OBJECT ${source})
  # The kernels call constexpr functions of core/, which nvcc allows only with this option.
  target_compile_options(cuda_${name} PRIVATE --expt-relaxed-constexpr)
  if(WERROR)
    target_compile_options(cuda_${name} PRIVATE --Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror)
  endif()
  target_link_libraries(${library} PRIVATE cuda_${name})
endfunction()
