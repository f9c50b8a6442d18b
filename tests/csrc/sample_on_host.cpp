// Runs csrc/sample_cuda.cu on the host: reads calls from a file, writes their tokens to another. Built and driven by
// test_sample_on_host.py.
//
// A call is one Header, then the logits, then the logits without the condition (if guided), then the image indices
// (int64). Its answer: int64 tokens, and one int64 that says whether a row was bad.
#include "../../csrc/sample_cuda.cu"

#include <cstdio>
#include <cstring>

namespace {

struct Header {
  int64_t rows, vocab, type, guided, seed, position, top_k, threads;
  double temperature, top_p, guidance;
};

bool read(std::FILE* file, void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }

void run(const star_fast::Problem& p, int64_t threads) {
  switch (threads) {
    case 32: star_fast::launch_sampling<32, 2>(p, nullptr); break;  // 256 tokens in registers: most rows are read again
    case 64: star_fast::launch_sampling<64, 64>(p, nullptr); break;  // 16384 tokens in registers
    case 1024: star_fast::sample_tokens_cuda(p, nullptr); break;     // as on a GPU
    default: std::abort();
  }
}

}  // namespace

int main(int count, char** names) {
  if (count != 3) return 2;
  std::FILE *in = std::fopen(names[1], "rb"), *out = std::fopen(names[2], "wb");
  if (!in || !out) return 2;
  Header h;
  while (read(in, &h, sizeof h)) {
    const size_t row_bytes = size_t(h.vocab) * (h.type == 0 ? 4 : 2);
    // Exactly as long as the rows are: AddressSanitizer sees a read beyond them.
    std::unique_ptr<char[]> cond(new char[size_t(h.rows) * row_bytes]), uncond;
    if (!read(in, cond.get(), size_t(h.rows) * row_bytes)) return 3;
    if (h.guided) {
      uncond.reset(new char[size_t(h.rows) * row_bytes]);
      if (!read(in, uncond.get(), size_t(h.rows) * row_bytes)) return 3;
    }
    std::vector<int64_t> image_index(size_t(h.rows)), tokens(size_t(h.rows), -1);
    if (!read(in, image_index.data(), image_index.size() * 8)) return 3;
    int32_t bad_rows = 0;
    star_fast::Problem p{};
    p.logits = cond.get();
    p.uncond = uncond.get();
    p.logits_row_stride = p.uncond_row_stride = h.vocab;
    p.type = star_fast::LogitType(h.type);
    p.rows = h.rows;
    p.vocab = int32_t(h.vocab);
    p.image_index = image_index.data();
    p.seed_at = &h.seed;
    p.position_at = &h.position;
    p.settings = star_fast::make_settings(h.temperature, h.top_k, h.top_p, h.guidance, h.vocab);
    p.out = tokens.data();
    p.bad_rows = &bad_rows;
    run(p, h.threads);
    const int64_t bad = bad_rows;
    if (std::fwrite(tokens.data(), 8, tokens.size(), out) != tokens.size() || std::fwrite(&bad, 8, 1, out) != 1)
      return 3;
  }
  std::fclose(in);
  return std::fclose(out) == 0 ? 0 : 3;
}
