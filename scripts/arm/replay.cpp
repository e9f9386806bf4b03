// Runs recorded calls of the library's functions (calls.py): reads them from the standard input, and writes what memory
// holds behind each to the standard output.

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

extern "C" const char* describe_library();

namespace {

template <class T>
T read() {
    T value;
    if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(3);
    return value;
}

std::string read_bytes() {
    std::string bytes(read<uint64_t>(), '\0');
    if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) std::exit(3);
    return bytes;
}

// On AArch64 integers and floating-point numbers are passed in registers of their own, in their order, and further
// integers on the stack: one type fits every function that takes at most one float and 16 integers or addresses.
using Function = void (*)(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, float
);

std::map<std::string, Function> functions() {
    std::map<std::string, Function> found;
    std::istringstream lines(describe_library());
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string kind, name, format;
        uintptr_t address = 0;
        if (words >> kind >> name >> format >> address && kind == "function")
            found[name + " (" + format + ")"] = reinterpret_cast<Function>(address);
    }
    return found;
}

}  // namespace

int main() {
    const std::map<std::string, Function> known = functions();
    for (int64_t left = read<int64_t>(); left > 0; --left) {
        const std::string name = read_bytes();
        std::vector<std::string> buffers(read<int64_t>());
        for (std::string& each : buffers) each = read_bytes();
        std::vector<std::vector<char>> memory;  // aligned as vectors of the library may expect
        std::vector<char*> starts;
        for (const std::string& each : buffers) {
            memory.emplace_back(each.size() + 64);
            char* start = memory.back().data();
            start += (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
            std::memcpy(start, each.data(), each.size());
            starts.push_back(start);
        }
        for (int64_t addresses = read<int64_t>(); addresses > 0; --addresses) {  // fields of structures
            const int64_t of = read<int64_t>(), offset = read<int64_t>(), target = read<int64_t>();
            std::memcpy(starts.at(of) + offset, &starts.at(target), sizeof(char*));
        }
        int64_t integers[16] = {}, count = 0;
        float number = 0.0f;
        for (int64_t arguments = read<int64_t>(); arguments > 0; --arguments) {
            const char kind = read<char>();
            if (kind == 'f') {
                number = static_cast<float>(read<double>());
                continue;
            }
            const int64_t value = read<int64_t>();
            if (count == 16) std::exit(4);
            integers[count++] = kind == 'b' ? reinterpret_cast<int64_t>(starts.at(value)) : value;
        }
        const auto place = known.find(name);
        const char is_known = place != known.end();
        std::fwrite(&is_known, 1, 1, stdout);
        if (!is_known) continue;
        const int64_t* i = integers;
        place->second(
            i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], i[14], i[15], number
        );
        for (size_t each = 0; each < buffers.size(); ++each) std::fwrite(starts[each], 1, buffers[each].size(), stdout);
    }
}
