// The kernels for any CPU, in the compiler's own 128-bit vectors: SSE2 on x86-64, NEON on arm64.
#include "core.h"

#define E2E_NAMESPACE E2E_VARIANT(e2e_generic)
#define E2E_FLOATS e2e::kernels_generic
#define E2E_ISA 128
#include "kernels.h"

const e2e::Kernels* e2e::E2E_VARIANT(kernels_generic)() { return &E2E_NAMESPACE::kTable; }
