// The functions that Python calls, the only symbols that the library shows.
#pragma once

#if defined(__GNUC__) || defined(__clang__)
#define E2E_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define E2E_EXPORT extern "C"
#endif
