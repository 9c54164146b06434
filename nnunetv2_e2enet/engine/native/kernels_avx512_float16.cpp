// The same for maps in float16.
#define E2E_FLOAT16
#include "kernels_avx512.cpp"
