// The stand-in toolkit's acl/acl.h: the one function of the runtime that is called.
#ifndef JAX_KVCACHE_FFI_STANDIN_ACL_ACL_H_
#define JAX_KVCACHE_FFI_STANDIN_ACL_ACL_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void* aclrtStream;

const char* aclGetRecentErrMsg();

#ifdef __cplusplus
}
#endif

#endif  // JAX_KVCACHE_FFI_STANDIN_ACL_ACL_H_
