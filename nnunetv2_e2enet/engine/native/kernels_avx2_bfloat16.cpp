// The same for maps in bfloat16.
#define E2E_BFLOAT16
#include "kernels_avx2.cpp"
