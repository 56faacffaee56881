// Owns the search for CANN's libraries.
#include "ascend/cann_binding.h"

#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <vector>

namespace jax_kvcache::cann {
namespace {

constexpr char kGetWorkspaceSize[] = "aclnnDequantRopeQuantKvcacheGetWorkspaceSize";
constexpr char kLaunch[] = "aclnnDequantRopeQuantKvcache";

void AddOnce(std::vector<std::string>* list, const std::string& entry) {
  if (std::find(list->begin(), list->end(), entry) == list->end()) list->push_back(entry);
}

// The parts of a text that are not empty, without blanks around them.
std::vector<std::string> Split(const std::string& text, char separator) {
  constexpr char kBlanks[] = " \t\r";
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    const size_t begin = part.find_first_not_of(kBlanks);
    if (begin == std::string::npos) continue;
    AddOnce(&parts, part.substr(begin, part.find_last_not_of(kBlanks) + 1 - begin));
  }
  return parts;
}

// The entries of a colon-separated environment variable.
std::vector<std::string> Entries(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? std::vector<std::string>{} : Split(value, ':');
}

// The toolkit's library folders, according to the variables that its set_env.sh sets.
std::vector<std::string> ToolkitFolders() {
  std::vector<std::string> folders;
  for (const char* variable : {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"}) {
    for (const std::string& home : Entries(variable)) AddOnce(&folders, home + "/lib64/");
  }
  return folders;
}

// Where a library of the toolkit may be: where the loader finds it, then the toolkit's folders.
std::vector<std::string> Places(const std::string& name) {
  std::vector<std::string> places = {name};
  for (const std::string& folder : ToolkitFolders()) places.push_back(folder + name);
  return places;
}

// The folders of the packages of operators that are installed into a toolkit, in the order that its
// vendors/config.ini gives: "load_priority=NAME,NAME".
std::vector<std::string> VendorFolders() {
  constexpr char kKey[] = "load_priority=";
  std::vector<std::string> folders;
  for (const std::string& operators : Entries("ASCEND_OPP_PATH")) {
    const std::string vendors = operators + "/vendors/";
    std::ifstream config(vendors + "config.ini");
    for (std::string line; std::getline(config, line);) {
      if (line.rfind(kKey, 0) != 0) continue;
      for (const std::string& name : Split(line.substr(sizeof kKey - 1), ',')) {
        AddOnce(&folders, vendors + name);
      }
      break;
    }
  }
  return folders;
}

// Where the operator may be, in the order that the vendor's own loader uses: libraries of custom
// operators, those of vendors' packages, the single operator library of older releases, the several
// ones of newer releases (from 8.5 on libopapi_transformer.so has it).
std::vector<std::string> OperatorPlaces() {
  std::vector<std::string> places;
  std::vector<std::string> folders = Entries("ASCEND_CUSTOM_OPP_PATH");
  for (const std::string& folder : VendorFolders()) AddOnce(&folders, folder);
  places.reserve(folders.size());
  for (const std::string& folder : folders) {
    places.push_back(folder + "/op_api/lib/libcust_opapi.so");
  }
  for (const std::string& place : Places("libopapi.so")) places.push_back(place);
  for (const std::string& folder : ToolkitFolders()) {
    glob_t found = {};
    if (glob((folder + "libopapi_*.so").c_str(), 0, nullptr, &found) == 0) {
      for (size_t i = 0; i < found.gl_pathc; ++i) places.emplace_back(found.gl_pathv[i]);
    }
    globfree(&found);
  }
  return places;
}

class Search {
 public:
  Binding Run() {
    Binding binding;
    Api& api = binding.api;
    binding.ok = Operator(&api) && Base(&api) && Runtime(&api);
    binding.text = binding.ok ? files_ + notes_ : error_;
    return binding;
  }

 private:
  bool Operator(Api* api) {
    for (const std::string& place : OperatorPlaces()) {
      operator_ = Open(place);
      if (operator_ == nullptr) continue;
      if (Load(kGetWorkspaceSize, {operator_}, &api->get_workspace_size) &&
          Load(kLaunch, {operator_}, &api->launch)) {
        AddFile(reinterpret_cast<void*>(api->launch));
        return true;
      }
      tried_ += "\n  " + place + ": has no " + kLaunch;
    }
    return Fail("library with aclnnDequantRopeQuantKvcache");
  }

  // The operator's library is searched first: it may have loaded its own copy of libnnopbase.so.
  bool Base(Api* api) {
    std::vector<void*> libraries = {operator_};
    for (const std::string& place : Places("libnnopbase.so")) libraries.push_back(Open(place));
    const bool found = Load("aclCreateTensor", libraries, &api->create_tensor) &&
                       Load("aclDestroyTensor", libraries, &api->destroy_tensor) &&
                       Load("aclCreateIntArray", libraries, &api->create_int_array) &&
                       Load("aclDestroyIntArray", libraries, &api->destroy_int_array);
    if (!found) return Fail(missing_ + " (of libnnopbase.so)");
    for (const bool optional :
         {Load("aclSetAclOpExecutorRepeatable", libraries, &api->set_executor_repeatable),
          Load("aclDestroyAclOpExecutor", libraries, &api->destroy_executor)}) {
      if (!optional) notes_ = "; without " + missing_;
    }
    AddFile(reinterpret_cast<void*>(api->create_tensor));
    return true;
  }

  bool Runtime(Api* api) {
    std::vector<void*> libraries = {operator_};
    for (const std::string& place : Places("libascendcl.so")) libraries.push_back(Open(place));
    if (!Load("aclGetRecentErrMsg", libraries, &api->get_recent_err_msg)) {
      return Fail(missing_ + " (of libascendcl.so)");
    }
    AddFile(reinterpret_cast<void*>(api->get_recent_err_msg));
    return true;
  }

  // The library is never closed, because CANN has threads that run its code.
  void* Open(const std::string& place) {
    void* library = dlopen(place.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* reason = dlerror();  // it begins with the file's name
      tried_ += std::string("\n  ") + (reason == nullptr ? place.c_str() : reason);
    }
    return library;
  }

  template <typename Fn>
  bool Load(const char* name, const std::vector<void*>& libraries, Fn** fn) {
    for (void* library : libraries) {
      if (library == nullptr) continue;
      *fn = reinterpret_cast<Fn*>(dlsym(library, name));
      if (*fn != nullptr) return true;
    }
    missing_ = name;
    return false;
  }

  void AddFile(void* function) {
    Dl_info info = {};
    if (dladdr(function, &info) == 0 || info.dli_fname == nullptr) return;
    files_ += (files_.empty() ? "" : ", ") + std::string(info.dli_fname);
  }

  bool Fail(const std::string& what) {
    error_ = "CANN was not found: no " + what +
             ". Run `source set_env.sh` of the CANN toolkit before Python, which sets "
             "ASCEND_HOME_PATH and the loader's path. Looked at:" +
             tried_;
    return false;
  }

  void* operator_ = nullptr;
  std::string tried_;
  std::string files_;
  std::string missing_;
  std::string notes_;
  std::string error_;
};

}  // namespace

const Binding& Bind() {
  static const Binding* const binding = new Binding(Search().Run());
  return *binding;
}

}  // namespace jax_kvcache::cann
