// The functions that Python calls, the only symbols that the library shows.
#pragma once

#define E2E_EXPORT extern "C" __attribute__((visibility("default")))
