// Owns the binding to CANN's libraries, made at run time so that one build runs with every release
// of CANN and without any.
#ifndef JAX_KVCACHE_FFI_CANN_BINDING_H_
#define JAX_KVCACHE_FFI_CANN_BINDING_H_

#include <string>

#include "cann.h"

namespace jax_kvcache::cann {

struct Api {
  CreateTensorFn* create_tensor = nullptr;
  DestroyTensorFn* destroy_tensor = nullptr;
  CreateIntArrayFn* create_int_array = nullptr;
  DestroyIntArrayFn* destroy_int_array = nullptr;
  SetExecutorRepeatableFn* set_executor_repeatable = nullptr;
  DestroyExecutorFn* destroy_executor = nullptr;
  GetWorkspaceSizeFn* get_workspace_size = nullptr;
  LaunchFn* launch = nullptr;
  GetRecentErrMsgFn* get_recent_err_msg = nullptr;
};

struct Binding {
  bool ok = false;
  Api api;           // complete where ok
  std::string text;  // the files bound, or why there are none, with every place looked at
};

// Looks for CANN at the first call, from whichever thread; the answer then stays.
const Binding& Bind();

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_CANN_BINDING_H_
