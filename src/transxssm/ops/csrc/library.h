// How the library tells launch.py what is in it: the name, address and argument types of each function, and the name,
// offset and type of each field of a structure. Nothing is declared a second time in Python, so that the two sides
// cannot disagree about memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "numbers.h"

// Checks a condition that accesses to memory depend on. A violation is a bug of this package: the process ends with a
// message instead of reading or writing somewhere else.
#define TRANSXSSM_REQUIRE(condition, message)                                                                      \
    do {                                                                                                           \
        if (!(condition)) {                                                                                        \
            std::fprintf(stderr, "transxssm: %s (%s:%d: %s is false)\n", message, __FILE__, __LINE__, #condition); \
            std::abort();                                                                                          \
        }                                                                                                          \
    } while (false)

#define TRANSXSSM_FIELD(Structure, field) \
    describe_field(to, #field, offsetof(Structure, field), type_name<decltype(Structure::field)>())

namespace {

// The name that launch.py knows a type by: a number ("int64"), a pointer to numbers ("float32*"), or a structure
// ("Step").
template <class T>
std::string type_name() {
    using Plain = std::remove_cv_t<T>;
    if constexpr (std::is_void_v<Plain>) {
        return "void";
    } else if constexpr (std::is_same_v<Plain, int64_t>) {
        return "int64";
    } else if constexpr (std::is_same_v<Plain, int32_t>) {
        return "int32";
    } else if constexpr (std::is_same_v<Plain, float>) {
        return "float32";
    } else if constexpr (std::is_same_v<Plain, double>) {
        return "float64";
    } else if constexpr (std::is_same_v<Plain, bfloat16>) {
        return "bfloat16";
    } else if constexpr (std::is_same_v<Plain, char>) {
        return "uint8";
    } else if constexpr (std::is_pointer_v<Plain>) {
        return type_name<std::remove_pointer_t<Plain>>() + "*";
    } else {  // a reference to a structure: the calling convention passes its address
        return std::remove_cv_t<std::remove_reference_t<Plain>>::NAME;
    }
}

// Adds a function to the description. `formats` are the number formats that it is for: that of its inputs, "bfloat16",
// or that and the one of the operands of its matrix products, "bfloat16_by_float32"; "any" where there are no such
// arrays.
template <class Result, class... Arguments>
void describe_function(
    std::string& to, const std::string& name, const std::string& formats, Result (*function)(Arguments...)
) {
    to += "function " + name + " " + formats + " " + std::to_string(reinterpret_cast<uintptr_t>(function)) + " " +
          type_name<Result>();
    ((to += " " + type_name<Arguments>()), ...);
    to += "\n";
}

// Adds a structure, whose fields follow in the order in which they are declared.
template <class Structure>
void describe_structure(std::string& to) {
    to += "structure " + std::string(Structure::NAME) + " " + std::to_string(sizeof(Structure)) + "\n";
}

inline void describe_field(std::string& to, const char* name, size_t offset, const std::string& type) {
    to += "field " + std::string(name) + " " + std::to_string(offset) + " " + type + "\n";
}

}  // namespace

// Each file adds what it has.
void describe_rows(std::string& to);
void describe_few_tokens(std::string& to);
void describe_step(std::string& to);
void describe_scan(std::string& to);
void describe_scan_bf16(std::string& to);
void describe_attention(std::string& to);
void describe_single_query(std::string& to);
