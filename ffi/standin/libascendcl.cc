// Owns the stand-in libascendcl.so, which has the message of the last failure.
#include "acl/acl.h"
#include "ledger.h"

extern "C" const char* aclGetRecentErrMsg() {
  if (standin::Ledger::Get().Enter("aclGetRecentErrMsg") != 0) return nullptr;
  return standin::RecentMessage();
}
