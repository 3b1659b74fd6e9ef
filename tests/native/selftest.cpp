// Calls the functions of a compiled library on given inputs and compares what they write with given references:
//
//     selftest LIBRARY CASES        one line per comparison that fails; exit status 1 if any does
//     selftest LIBRARY CASES bits   and one with a checksum for all numbers that are compared with a reference
//
// Without Python, so that it runs on a processor that is only emulated, or was just unpacked. tests/kernel_cases.py
// writes the cases, as 8-byte words of this byte order; strings and contents are filled up to whole words:
//
//     buffers   count; of each: bytes, content
//     links     count; of each: buffer, offset, target, offset in the target: an address to be written
//     steps     count; of each: CALL name arguments (of each: type, value, offset)
//                               NEAR name buffer kind count reference tolerance      |x - y| <= tolerance * (1 + |y|)
//                               SAME name buffer offset other offset bytes           bit by bit

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <vector>

enum Step { CALL, NEAR, SAME };
enum Argument { INTEGER, REAL, ADDRESS };
enum Kind { F64, F32, BF16, I64 };
constexpr int SIZES[] = {8, 4, 2, 8};

struct Reader {
    std::vector<char> content;
    size_t at = 0;

    template <class T = int64_t> T word() {
        T value;
        memcpy(&value, content.data() + at, 8);
        at += 8;
        return value;
    }
    std::vector<char> bytes() {
        const size_t size = word();
        std::vector<char> found(content.begin() + at, content.begin() + at + size);
        at += (size + 7) / 8 * 8;
        return found;
    }
    std::string text() {
        const std::vector<char> found = bytes();
        return std::string(found.begin(), found.end());
    }
};

struct Buffer {
    char* data;  // aligned as vectors like it
    explicit Buffer(const std::vector<char>& content) : data(new (std::align_val_t(64)) char[content.size() + 64]) {
        memcpy(data, content.data(), content.size());
    }
};

double number(const char* data, int64_t kind, int64_t index) {
    if (kind == F64) return ((const double*)data)[index];
    if (kind == F32) return ((const float*)data)[index];
    if (kind == I64) return double(((const int64_t*)data)[index]);
    const uint32_t bits = uint32_t(((const uint16_t*)data)[index]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Integers and addresses go into registers of one sort, then onto the stack, numbers into registers of another: so one
// type of function fits all. (Not on Windows, which counts them together.)
void call(void* library, Reader& cases, std::vector<Buffer>& buffers) {
    const std::string name = cases.text();
    int64_t given[14] = {}, integers = 0;
    double numbers[4] = {};
    int reals = 0;
    for (int64_t count = cases.word(); count; count--) {
        const int64_t type = cases.word();
        if (type == REAL) {
            numbers[reals++] = cases.word<double>();
            cases.word();
        } else {
            const int64_t value = cases.word(), offset = cases.word();
            given[integers++] = type == ADDRESS ? int64_t(buffers[value].data + offset) : value;
        }
    }
    typedef void Function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, double, double, double, double);
    Function* function = (Function*)dlsym(library, name.c_str());
    if (!function) {
        fprintf(stderr, "%s: not in the library\n", name.c_str());
        exit(2);
    }
    const int64_t* g = given;
    function(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], numbers[0], numbers[1],
             numbers[2], numbers[3]);
}

// FNV-1a.
unsigned long long checksum(const char* data, int64_t size) {
    uint64_t sum = 0xCBF29CE484222325;
    for (int64_t i = 0; i < size; i++) sum = (sum ^ uint8_t(data[i])) * 0x100000001B3;
    return sum;
}

bool near(Reader& cases, std::vector<Buffer>& buffers, bool bits) {
    const std::string name = cases.text();
    const char* found = buffers[cases.word()].data;
    const int64_t kind = cases.word(), count = cases.word();
    const double *reference = (const double*)buffers[cases.word()].data, tolerance = cases.word<double>();
    if (bits) printf("%016llx %s\n", checksum(found, count * SIZES[kind]), name.c_str());
    double worst = 0;
    int64_t where = 0;
    for (int64_t i = 0; i < count; i++) {
        const double off = std::fabs(number(found, kind, i) - reference[i]) / (1 + std::fabs(reference[i]));
        if (!(off <= worst)) worst = off, where = i;  // NaN too
        if (off != off) break;
    }
    if (worst <= tolerance) return true;
    printf("%s: number %lld is %g, the reference %g\n", name.c_str(), (long long)where, number(found, kind, where),
           reference[where]);
    return false;
}

bool same(Reader& cases, std::vector<Buffer>& buffers) {
    const std::string name = cases.text();
    const char* one = buffers[cases.word()].data;
    one += cases.word();
    const char* other = buffers[cases.word()].data;
    other += cases.word();
    if (!memcmp(one, other, cases.word())) return true;
    printf("%s: not the same bits\n", name.c_str());
    return false;
}

int main(int count, char** arguments) {
    const bool bits = count == 4 && std::string(arguments[3]) == "bits";
    if (count != 3 + bits) {
        fprintf(stderr, "selftest LIBRARY CASES [bits]\n");
        return 2;
    }
    void* library = dlopen(arguments[1], RTLD_NOW);
    std::ifstream file(arguments[2], std::ios::binary);
    if (!library || !file) {
        fprintf(stderr, "%s\n", library ? arguments[2] : dlerror());
        return 2;
    }
    Reader cases{std::vector<char>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>())};
    std::vector<Buffer> buffers;
    for (int64_t left = cases.word(); left; left--) buffers.emplace_back(cases.bytes());
    for (int64_t left = cases.word(); left; left--) {
        char* at = buffers[cases.word()].data;
        at += cases.word();
        char* target = buffers[cases.word()].data;
        target += cases.word();
        memcpy(at, &target, 8);
    }
    int failed = 0, compared = 0;
    for (int64_t left = cases.word(); left; left--) {
        const int64_t step = cases.word();
        if (step == CALL) {
            call(library, cases, buffers);
        } else {
            compared++;
            failed += !(step == NEAR ? near(cases, buffers, bits) : same(cases, buffers));
        }
    }
    printf("%d of %d comparisons failed\n", failed, compared);
    fflush(stdout);
    _Exit(failed != 0);  // threads of the library may wait for work
}
