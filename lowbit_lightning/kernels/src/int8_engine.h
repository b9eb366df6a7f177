// The engine of int8 products that this build has, or, for AMX, that the system allows.
#pragma once
#include "int8_amx.h"
#include "int8_dot.h"

#if LB_AMX
#define LB_NAME (amx_allowed() ? "AMX" : "AMX refused, " LB_DOT_NAME)
#define LB_BY_ENGINE(...)                                                                              \
    if (amx_allowed()) { typedef Amx Engine; __VA_ARGS__; } else { typedef Dots Engine; __VA_ARGS__; }
#else
#define LB_NAME LB_DOT_NAME
#define LB_BY_ENGINE(...) { typedef Dots Engine; __VA_ARGS__; }
#endif
