// AVX2 with FMA and F16C: every x86-64 server since 2013. Integer sums of 32 products in two steps.
#include "avx2.h"

namespace greenroom {
namespace {

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

Kernel kernel(const Matrix& matrix, Batch batch) {
    switch (matrix.bits) {
        case 2: return kernel_for<Avx2, 2>(matrix.group_size, batch);
        case 3: return kernel_for<Avx2, 3>(matrix.group_size, batch);
        case 4: return kernel_for<Avx2, 4>(matrix.group_size, batch);
        case 8: return integer_kernel<Avx2, 8>(matrix.group_size);
        default: return kernel_of<Float<Avx2, 16>>();
    }
}

}  // namespace

const Isa kAvx2 = {"avx2", "AVX2", supported, kernel, activate, attend<Avx2>, mix<Avx2>,
                   widen_keys<Avx2>, widen_values<Avx2>, attend_causally<Avx2>};

}  // namespace greenroom
