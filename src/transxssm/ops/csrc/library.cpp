// The one symbol of the library that is found by its name.

#include "library.h"

extern "C" __attribute__((visibility("default"))) const char* describe_library() {
    static const std::string description = [] {
        std::string text;
        describe_rows(text);
        describe_few_tokens(text);
        describe_step(text);
        describe_scan(text);
        describe_scan_bf16(text);
        describe_attention(text);
        describe_single_query(text);
        return text;
    }();
    return description.c_str();
}
