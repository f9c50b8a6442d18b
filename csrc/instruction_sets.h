// For which instruction sets the per-row headers are compiled, and which of them this machine gets.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define STAR_FAST_X86 1
#endif

namespace star_fast {
namespace {

enum class WidestSet { baseline, avx2, avx512 };

// What PyTorch itself uses here (ATEN_CPU_CAPABILITY lowers it).
inline WidestSet widest_set() {
  static const std::string name = at::get_cpu_capability();
  return name == "AVX512" ? WidestSet::avx512 : name == "AVX2" ? WidestSet::avx2 : WidestSet::baseline;
}

}  // namespace
}  // namespace star_fast
