// The loops of the header that STAR_FAST_ROWS names, compiled once for each instruction set, in namespaces baseline,
// avx2 and avx512, each after lanes.h; and STAR_FAST_HERE(function): that template of theirs, for this machine and the
// entries' type T. Included inside a namespace (hence no #pragma once), after instruction_sets.h.
// STAR_FAST_VECTOR_BYTES tells the loops how wide registers are, 0 where no instruction may be called by name: by hand,
// as g++ defines __AVX2__ and the like for the command line only, not after a pragma.

#ifdef __x86_64__
#define STAR_FAST_VECTOR_BYTES 16
#else
#define STAR_FAST_VECTOR_BYTES 0
#endif
namespace baseline {
#include "lanes.h"
#include STAR_FAST_ROWS
}
#undef STAR_FAST_VECTOR_BYTES

#ifdef STAR_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define STAR_FAST_VECTOR_BYTES 32
namespace avx2 {
#include "lanes.h"
#include STAR_FAST_ROWS
}
#undef STAR_FAST_VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define STAR_FAST_VECTOR_BYTES 64
namespace avx512 {
#include "lanes.h"
#include STAR_FAST_ROWS
}
#undef STAR_FAST_VECTOR_BYTES
#pragma GCC pop_options

#define STAR_FAST_HERE(function)                            \
  (widest_set() == WidestSet::avx512 ? &avx512::function<T> \
   : widest_set() == WidestSet::avx2 ? &avx2::function<T>   \
                                     : &baseline::function<T>)
#else
#define STAR_FAST_HERE(function) (&baseline::function<T>)
#endif
