#include "dispatch.h"

namespace pagemill {

namespace scalar { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
#endif

namespace {
struct Entry {
    const Kernels* kernels;
    bool available;
};

std::vector<Entry> entries() {
    std::vector<Entry> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    list.push_back({&avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
    list.push_back({&avx512::kernels, avx512});
    list.push_back({&avx2::kernels, avx2});
#endif
    list.push_back({&scalar::kernels, true});
    return list;
}
}  // namespace

std::vector<std::string> built_targets() {
    std::vector<std::string> names;
    for (const Entry& e : entries()) names.push_back(e.kernels->name);
    return names;
}

std::vector<std::string> available_targets() {
    std::vector<std::string> names;
    for (const Entry& e : entries())
        if (e.available) names.push_back(e.kernels->name);
    return names;
}

const Kernels* find_target(const std::string& name) {
    for (const Entry& e : entries())
        if (e.available && name == e.kernels->name) return e.kernels;
    return nullptr;
}

}  // namespace pagemill
