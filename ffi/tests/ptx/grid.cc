// Owns which PTX files a test has: JAX_KVCACHE_PTX, their paths with colons between.
#include "tests/ptx/grid.h"

#include <map>
#include <sstream>

#include "tests/check.h"

namespace jax_kvcache::ptx {
namespace {

// Without its type, namespaces and parameters.
std::string ShortName(const std::string& name) {
  const std::string last_namespace = "(anonymous namespace)::";
  const size_t begin = name.find(last_namespace) + last_namespace.size();
  return name.substr(begin, name.find('(', begin) - begin);
}

std::map<std::string, Program> LoadAll() {
  std::map<std::string, Program> programs;
  std::istringstream paths(JAX_KVCACHE_PTX);
  for (std::string path; std::getline(paths, path, ':');) {
    for (auto& [name, program] : Load(path)) {
      const bool is_new = programs.emplace(ShortName(name), std::move(program)).second;
      Check(is_new, "two kernels of one name: " + name);
    }
  }
  return programs;
}

}  // namespace

const Program& Compiled(const std::string& name) {
  static const std::map<std::string, Program> programs = LoadAll();
  const auto found = programs.find(name);
  Check(found != programs.end(), "no kernel " + name + " was compiled");
  return found->second;
}

}  // namespace jax_kvcache::ptx
