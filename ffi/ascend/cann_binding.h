// Owns the binding to CANN's libraries. It is made at run time, so that one build of this library
// runs with every release of CANN and without CANN.
#ifndef JAX_KVCACHE_FFI_ASCEND_CANN_BINDING_H_
#define JAX_KVCACHE_FFI_ASCEND_CANN_BINDING_H_

#include <string>

#include "ascend/cann.h"

namespace jax_kvcache::cann {

struct Api {
  CreateTensorFn* create_tensor = nullptr;
  DestroyTensorFn* destroy_tensor = nullptr;
  CreateIntArrayFn* create_int_array = nullptr;
  DestroyIntArrayFn* destroy_int_array = nullptr;
  SetExecutorRepeatableFn* set_executor_repeatable = nullptr;  // optional
  DestroyExecutorFn* destroy_executor = nullptr;               // optional
  GetWorkspaceSizeFn* get_workspace_size = nullptr;
  LaunchFn* launch = nullptr;
  GetRecentErrMsgFn* get_recent_err_msg = nullptr;
};

struct Binding {
  bool ok = false;
  Api api;           // complete but for the optional functions if `ok`
  std::string text;  // the files that were found, or why not, with every place that was searched
};

// The first call, on any thread, looks for CANN. Later calls return the same answer.
const Binding& Bind();

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_ASCEND_CANN_BINDING_H_
