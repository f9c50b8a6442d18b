// Asks the system for large pages: a processor that reads many megabytes in order waits for address translation at
// every 4 KiB.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace star_fast {
namespace {

// A wish, for memory not yet written to: the contents stay, and where the system has no large pages nothing happens.
void large_pages(at::Tensor& memory) {
#ifdef __linux__
  TORCH_CHECK_VALUE(memory.is_contiguous(), "large_pages: the tensor must be contiguous");
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + memory.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("large_pages", &large_pages); }

}  // namespace star_fast
