// The 8-bit loops compiled once for each way of multiplying, in namespaces baseline, avx2, avx512, vnni and amx, each
// after lanes.h; all but the first where STAR_FAST_X86 is defined. Included inside a namespace (hence no #pragma once),
// after int8_product.h, scalars.h and, on x86, <immintrin.h>. Knows no torch.

#define STAR_FAST_DOT 0
namespace baseline {
#include "lanes.h"
#include "int8_rows.h"
#include "int8_dot.h"
#include "int8_tiles.h"
}
#undef STAR_FAST_DOT

#ifdef STAR_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define STAR_FAST_DOT 1
namespace avx2 {
#include "lanes.h"
#include "int8_rows.h"
#include "int8_dot.h"
#include "int8_tiles.h"
}
#undef STAR_FAST_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define STAR_FAST_DOT 2
namespace avx512 {
#include "lanes.h"
#include "int8_rows.h"
#include "int8_dot.h"
#include "int8_tiles.h"
}
#undef STAR_FAST_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define STAR_FAST_DOT 3
namespace vnni {
#include "lanes.h"
#include "int8_rows.h"
#include "int8_dot.h"
#include "int8_tiles.h"
}
#undef STAR_FAST_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,prefer-vector-width=512")
namespace amx {
#include "lanes.h"
#include "int8_rows.h"
#include "int8_amx.h"
#include "int8_tiles.h"
}
#pragma GCC pop_options
#endif
