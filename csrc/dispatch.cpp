#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pagemill {

namespace scalar { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

// AMX tiles with bytes and bfloat16, byte permutations (AVX-512 VBMI), and the kernel's leave to use the tile state (Linux 5.16, arch_prctl).
static bool amx_available() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned vbmi = 1u << 1, bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
    if ((d & all) != all || (c & vbmi) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
}
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
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    list.push_back({&amx::kernels, bf16 && amx_available()});
    list.push_back({&avx512_bf16::kernels, bf16});
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
