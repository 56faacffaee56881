// Owns reading PTX: from text to a program. It reads what nvcc writes for the kernels and fails for
// what it does not know.
#include "tests/ptx/program.h"

#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <regex>

#include "tests/check.h"

namespace jax_kvcache::ptx {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  Check(file.good(), "no file " + path);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return std::regex_replace(text, std::regex("//[^\n]*"), "");
}

std::string Demangle(const std::string& name) {
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  Check(demangled != nullptr, "a kernel that is not a C++ function: " + name);
  const std::string text = demangled;
  std::free(demangled);  // NOLINT: it is malloc's
  return text;
}

std::vector<std::string> Words(const std::string& text, const char* separators) {
  std::vector<std::string> words;
  for (size_t end = 0; end < text.size();) {
    const size_t begin = text.find_first_not_of(separators, end);
    if (begin == std::string::npos) break;
    end = std::min(text.find_first_of(separators, begin), text.size());
    words.push_back(text.substr(begin, end - begin));
  }
  return words;
}

// A declaration's name, alignment and size: .param .align 8 .b8 name[408], .shared, or .param .u32
// name.
struct Variable {
  std::string name;
  size_t alignment = 1;
  size_t size = 1;
};
Variable ReadVariable(const std::string& declaration) {
  const std::vector<std::string> words = Words(declaration, " \t\n[],");
  Variable variable;
  size_t i = 1;
  if (words.at(i) == ".align") {
    variable.alignment = std::stoul(words.at(i + 1));
    i += 2;
  }
  const size_t item = std::stoul(words.at(i).substr(2)) / 8;  // .b8, .u32, .u64
  variable.name = words.at(i + 1);
  variable.size = item * (words.size() > i + 2 ? std::stoul(words[i + 2]) : 1);
  variable.alignment = std::max(variable.alignment, item);
  return variable;
}

class Reader {
 public:
  Program Read(const std::string& parameters, const std::string& body) {
    program_.thread_register = RegisterOf("%tid.x");
    program_.block_register = RegisterOf("%ctaid.x");
    for (const std::string& parameter : Words(parameters, ",\n")) {
      if (parameter.find(".param") != std::string::npos) {
        Place(ReadVariable(parameter), &program_.parameters_size);
      }
    }
    // Labels, braces that begin and end a scope, and statements that end with a semicolon.
    const std::regex part(R"(\s*(?:([$\w]+):|([{}])|([^;]*);))");
    auto at = body.begin();
    for (std::smatch match;
         std::regex_search(at, body.end(), match, part, std::regex_constants::match_continuous);
         at = match[0].second) {
      if (match[1].matched) labels_[match[1]] = program_.instructions.size();
      if (match[3].matched) ReadStatement(match[3]);
    }
    Check(std::string(at, body.end()).find_first_not_of(" \t\n") == std::string::npos,
          "PTX that is not understood");
    for (const auto& [instruction, label] : jumps_) {
      Check(labels_.count(label) == 1, "a jump to nowhere: " + label);
      program_.instructions[instruction].jump_to = labels_[label];
    }
    return std::move(program_);
  }

 private:
  void Place(const Variable& variable, size_t* size) {
    *size = (*size + variable.alignment - 1) / variable.alignment * variable.alignment;
    addresses_[variable.name] = *size;
    *size += variable.size;
  }

  // The register of an operand: a register, a variable's address, or a number.
  int RegisterOf(const std::string& operand) {
    const auto [found, is_new] = registers_.emplace(operand, program_.registers);
    if (!is_new) return found->second;
    ++program_.registers;
    if (operand[0] == '%') {
      Check(operand.find('.') == std::string::npos || operand == "%tid.x" || operand == "%ctaid.x",
            "a special register that is not known: " + operand);
    } else if (addresses_.count(operand) == 1) {
      program_.constants.emplace_back(found->second, addresses_[operand]);
    } else if (operand.substr(0, 2) == "0f") {  // the bits of a float32
      program_.constants.emplace_back(found->second, std::stoull(operand.substr(2), nullptr, 16));
    } else if (operand[0] == '-') {
      program_.constants.emplace_back(found->second, std::stoll(operand, nullptr, 0));
    } else if (std::isdigit(static_cast<unsigned char>(operand[0])) != 0) {
      program_.constants.emplace_back(found->second, std::stoull(operand, nullptr, 0));
    }  // else a register with a name, of a scope in inline assembly
    return found->second;
  }

  Operands ReadOperands(const std::string& text) {
    Operands operands;
    for (const std::string& word : Words(text, " \t\n,|{}[]")) {
      const size_t plus = word.find('+');
      if (plus != std::string::npos) operands.offset = std::stoll(word.substr(plus + 1));
      operands.registers.push_back(RegisterOf(word.substr(0, plus)));
    }
    return operands;
  }

  void ReadStatement(const std::string& text) {
    if (text[0] == '.') {  // .reg and .pragma say nothing that is needed
      if (text.substr(0, 7) == ".shared") Place(ReadVariable(text), &program_.shared_size);
      return;
    }
    static const std::regex form(R"((?:@(!?)(\S+)\s+)?(\S+)\s*([^]*))");
    std::smatch match;
    Check(std::regex_match(text, match, form), "PTX that is not understood: " + text);
    Instruction instruction;
    instruction.text = text;
    instruction.where_false = match[1].length() > 0;
    if (match[2].matched) instruction.predicate = RegisterOf(match[2]);
    std::string name = match[3];
    const std::string operands = match[4];
    if (name == "bra" || name == "bra.uni") {
      instruction.kind = Instruction::Kind::kJump;
      jumps_.emplace_back(program_.instructions.size(), operands);
    } else if (name == "ret") {
      instruction.kind = Instruction::Kind::kEnd;
    } else if (name == "bar.sync") {
      Check(operands == "0", "a barrier of part of a block: " + text);
      instruction.kind = Instruction::Kind::kBarrier;
    } else {
      // A mov between a register and two halves of one.
      if (name.substr(0, 4) == "mov." && operands.find('{') != std::string::npos) {
        name = (operands[0] == '{' ? "unpack" : "pack") + name.substr(3);
      }
      if (IsWarpWide(name)) instruction.kind = Instruction::Kind::kWarp;
      instruction.operation = MakeOperation(name, ReadOperands(operands));
    }
    program_.instructions.push_back(std::move(instruction));
  }

  Program program_;
  std::map<std::string, int> registers_;
  std::map<std::string, uint64_t> addresses_;
  std::map<std::string, size_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

std::map<std::string, Program> Load(const std::string& path) {
  const std::string text = ReadFile(path);
  std::map<std::string, Program> programs;
  // .entry name( parameters ) directives { body }
  for (size_t at = text.find(".entry "); at != std::string::npos;) {
    const size_t open = text.find('(', at);
    const size_t close = text.find(')', open);
    const size_t body = text.find("\n{", close);
    const size_t next = text.find(".entry ", close);
    const size_t end = text.rfind('}', next);
    Check(body < end && end != std::string::npos, "PTX that is not understood in " + path);
    const std::string name = Words(text.substr(at + 7, open - at - 7), " \t\n").at(0);
    programs[Demangle(name)] = Reader().Read(text.substr(open + 1, close - open - 1),
                                             text.substr(body + 2, end - body - 2));
    at = next;
  }
  Check(!programs.empty(), "no kernel in " + path);
  return programs;
}

}  // namespace jax_kvcache::ptx
