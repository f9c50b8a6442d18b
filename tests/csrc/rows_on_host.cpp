// Runs csrc/attend_row.h, between_rows.h and group_norm_rows.h on odd sizes, in heap buffers that are exactly as long
// as the layouts say, against plain loops in float64. Built under sanitizers and run by test_rows_on_host.py. Prints
// what is wrong and returns 1. With an argument that names a buffer ("keys", "values", "scales", "row", "pixels") that
// buffer is one entry short: a sanitizer has to stop the program.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "decode_step.h"
#include "dropout_row.h"
#include "scalars.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#define STAR_FAST_VECTOR_BYTES 0
namespace portable {
#include "lanes.h"
#include "attend_row.h"
#include "between_rows.h"
#include "group_norm_rows.h"
}
#undef STAR_FAST_INLINE
#undef STAR_FAST_VECTOR_BYTES
#ifdef __AVX512BW__
#define STAR_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define STAR_FAST_VECTOR_BYTES 32
#elif defined(__SSE2__)
#define STAR_FAST_VECTOR_BYTES 16
#else
#define STAR_FAST_VECTOR_BYTES 0
#endif
#if STAR_FAST_VECTOR_BYTES
}  // namespace
}  // namespace star_fast
#include <immintrin.h>
namespace star_fast {
namespace {
#endif
namespace here {
#include "lanes.h"
#include "attend_row.h"
#include "between_rows.h"
#include "group_norm_rows.h"
}

std::string short_buffer;
int wrong = 0;
std::mt19937 generator(1);

float number() { return std::normal_distribution<float>()(generator); }

// As long as asked for and not a byte longer; entries are all ones bits: NaN, or codes of -1.
template <class T>
std::unique_ptr<T[]> buffer(int64_t n, const char* name = "") {
  if (*name && short_buffer == name) --n;
  std::unique_ptr<T[]> made(new T[n]);
  std::memset(static_cast<void*>(made.get()), 0xff, n * sizeof(T));
  return made;
}

void expect(bool holds, const char* what, int size, int position, double got = 0, double wanted = 0) {
  if (holds) return;
  std::printf("%s: size %d, position %d: got %.9g, expected %.9g\n", what, size, position, got, wanted);
  wrong = 1;
}

template <class T, class Cached>
void attend(int rows, int heads, int positions, int size, double allowed) {
  using At = Layout<Cached>;
  const int64_t blocks = rounded_up(positions, kBlock) / kBlock, streams = int64_t(rows) * heads,
                padded = blocks * kBlock;
  const int64_t head_keys = blocks * At::block_entries(size), head_values = padded * At::width(size);
  const bool scaled = sizeof(Cached) == 1;
  const auto keys = buffer<Cached>(streams * head_keys, "keys"),
             values = buffer<Cached>(streams * head_values, "values");
  const auto key_scales = buffer<float>(scaled ? streams * padded : 0),
             value_scales = buffer<float>(scaled ? streams * padded : 0, scaled ? "scales" : "");
  const auto angles = buffer<float>(size), qkv_numbers = buffer<float>(streams * 3 * size);
  const auto qkv = buffer<T>(streams * 3 * size, "row"), out = buffer<T>(streams * size),
             again = buffer<T>(streams * size);
  for (int position = 0; position < positions; ++position) {
    for (int e = 0; e < size; e += 2) {
      const float angle = number();
      angles[e] = std::cos(angle);
      angles[e + 1] = std::sin(angle);
    }
    for (int64_t i = 0; i < streams * 3 * size; ++i) round_to(number(), qkv.get() + i);
    Step<T, Cached> step{};
    step.qkv = qkv.get();
    step.row_stride = int64_t(3) * heads * size;
    step.part_stride = int64_t(heads) * size;
    step.head_stride = step.size = size;
    step.heads = heads;
    step.keys = keys.get();
    step.values = values.get();
    if (scaled) step.key_scales = key_scales.get(), step.value_scales = value_scales.get();
    step.blocks = blocks;
    step.position = position;
    step.angles = angles.get();
    step.out = out.get();
    here::attend_rows(step, 0, streams);
    step.out = again.get();
    portable::attend_rows(step, 0, streams);
    expect(std::memcmp(out.get(), again.get(), streams * size * sizeof(T)) == 0, "instruction sets differ", size,
           position);
    for (int64_t one = 0; one < streams; ++one) {
      const T* given = qkv.get() + one / heads * step.row_stride + one % heads * size;
      const auto key = [&](int s, int e) {
        return double(to_float(keys[one * head_keys + At::key_at(s, e, size)])) *
               (scaled ? double(key_scales[one * padded + s]) : 1.0);
      };
      const auto value = [&](int s, int e) {
        return double(to_float(values[one * head_values + At::value_at(s, e, size)])) *
               (scaled ? double(value_scales[one * padded + s]) : 1.0);
      };
      std::vector<double> weights(position + 1), expected(size);
      double total = 0, largest = 0;
      for (int s = 0; s <= position; ++s) {
        double score = 0;
        for (int e = 0; e < size; e += 2) {
          const double a = to_float(given[e]), b = to_float(given[e + 1]), cos = angles[e], sin = angles[e + 1];
          score += (a * cos - b * sin) * key(s, e) + (a * sin + b * cos) * key(s, e + 1);
        }
        total += weights[s] = std::exp(score / std::sqrt(double(size)));
        for (int e = 0; e < size; ++e) {
          expected[e] += weights[s] * value(s, e);
          largest = std::fmax(largest, std::fabs(value(s, e)));
        }
      }
      for (int e = 0; e < size; ++e) {
        const double wanted = expected[e] / total, got = to_float(out[one * size + e]);
        expect(std::fabs(got - wanted) <= allowed * largest + (sizeof(T) == 2 ? std::fabs(wanted) / 256 : 0),
               "attend_rows", size, position, got, wanted);
        const double appended = value(position, e), v = to_float(given[2 * heads * size + e]);
        expect(std::fabs(appended - v) <= (scaled ? 0.51 / 127 * largest : 1e-30), "appended value", size, position,
               appended, v);
      }
    }
  }
}

// Forward and backward of both ops on one row, whole vectors wide.
template <class T>
void between(int width, double allowed) {
  const auto x = buffer<T>(width, "row"), residual = buffer<T>(width), weight = buffer<T>(width),
             normed = buffer<T>(width), sum = buffer<T>(width);
  const auto dnormed = buffer<T>(width), dsum = buffer<T>(width), dh = buffer<T>(width), pairs = buffer<T>(2 * width),
             dout = buffer<T>(width);
  const auto gated = buffer<T>(width), dpairs = buffer<T>(2 * width);
  const auto dweight = buffer<float>(width);
  for (int e = 0; e < width; ++e) {
    for (T* row : {x.get(), residual.get(), weight.get(), dnormed.get(), dsum.get(), pairs.get(), pairs.get() + width,
                   dout.get()})
      round_to(number(), row + e);
    dweight[e] = 0;
  }
  const DropoutRow none{nullptr, 0, 0, 0.0f};
  here::add_rms_norm_row(x.get(), residual.get(), weight.get(), 1e-5f, width, none, normed.get(), sum.get());
  here::add_rms_norm_backward_row(sum.get(), weight.get(), dnormed.get(), dsum.get(), 1e-5f, width, none, dh.get(),
                                  static_cast<T*>(nullptr), dweight.get());
  here::swiglu_row(pairs.get(), width, gated.get());
  here::swiglu_backward_row(pairs.get(), dout.get(), width, dpairs.get());
  double squares = 0, projection = 0;
  for (int e = 0; e < width; ++e) squares += std::pow(double(to_float(sum[e])), 2);
  const double inverse = 1 / std::sqrt(squares / width + 1e-5);
  for (int e = 0; e < width; ++e)
    projection += double(to_float(dnormed[e])) * to_float(weight[e]) * to_float(sum[e]) * inverse / width;
  const auto near = [&](const char* what, int e, double got, double wanted) {
    expect(std::fabs(got - wanted) <= allowed * (1 + std::fabs(wanted)), what, width, e, got, wanted);
  };
  for (int e = 0; e < width; ++e) {
    const double h = to_float(sum[e]), n = h * inverse, a = to_float(pairs[e]), b = to_float(pairs[width + e]),
                 s = 1 / (1 + std::exp(-a));
    near("sum", e, h, double(to_float(x[e])) + to_float(residual[e]));
    near("normed", e, to_float(normed[e]), n * to_float(weight[e]));
    near("gradient of sum", e, to_float(dh[e]),
         (to_float(dnormed[e]) * double(to_float(weight[e])) - n * projection) * inverse + to_float(dsum[e]));
    near("gradient of weight", e, dweight[e], to_float(dnormed[e]) * n);
    near("swiglu", e, to_float(gated[e]), a * s * b);
    near("gradient of a", e, to_float(dpairs[e]), to_float(dout[e]) * b * s * (1 + a * (1 - s)));
    near("gradient of b", e, to_float(dpairs[width + e]), to_float(dout[e]) * a * s);
  }
}

// Sums and scaled rows of a part of an image: `rows` rows of `width` entries, a multiple of 32.
template <class T>
void group_norm(int rows, int width, double allowed) {
  const auto x = buffer<T>(int64_t(rows) * width, "pixels"), out = buffer<T>(int64_t(rows) * width),
             again = buffer<T>(int64_t(rows) * width);
  const auto center = buffer<float>(width), sums = buffer<float>(width), squares = buffer<float>(width),
             scale = buffer<float>(width);
  const auto shift = buffer<float>(width);
  for (int i = 0; i < rows * width; ++i) round_to(3 + 4 * number(), x.get() + i);
  for (int e = 0; e < width; ++e) center[e] = 3 + number(), scale[e] = number(), shift[e] = number();
  here::part_sums(x.get(), rows, width, center.get(), sums.get(), squares.get());
  for (const bool silu : {true, false}) {
    here::part_scaled(x.get(), rows, width, scale.get(), shift.get(), silu, out.get());
    portable::part_scaled(x.get(), rows, width, scale.get(), shift.get(), silu, again.get());
    expect(std::memcmp(out.get(), again.get(), int64_t(rows) * width * sizeof(T)) == 0,
           "instruction sets differ in group_norm", width, rows);
    for (int place = 0; place < width; ++place) {
      const int entry = here::entry_at<T>(place);
      double sum = 0, square = 0;
      for (int row = 0; row < rows; ++row) {
        const double given = to_float(x[row * width + entry]), off = given - center[place],
                     n = given * scale[place] + shift[place];
        sum += off;
        square += off * off;
        const double wanted = silu ? n / (1 + std::exp(-n)) : n, got = to_float(out[row * width + entry]);
        expect(std::fabs(got - wanted) <= allowed * (1 + std::fabs(wanted)), "part_scaled", width, row, got, wanted);
      }
      expect(std::fabs(sums[place] - sum) <= 1e-5 * (1 + square), "part_sums", width, place, sums[place], sum);
      expect(std::fabs(squares[place] - square) <= 1e-5 * (1 + square), "squares of part_sums", width, place,
             squares[place], square);
    }
  }
}

}  // namespace
}  // namespace star_fast

int main(int count, char** arguments) {
  using namespace star_fast;
  if (count > 1) short_buffer = arguments[1];
  for (const int size : {2, 6, 16, 34, 64, 100}) {
    const int positions = size == 6 ? 35 : size == 16 ? 16 : 18;
    attend<float, float>(2, 3, positions, size, 3e-6);
    attend<Bfloat16Bits, Bfloat16Bits>(1, 2, positions, size, 3e-6);
    attend<float, int8_t>(1, 3, positions, size, 1.0 / 2048);
    attend<Bfloat16Bits, int8_t>(2, 1, positions, size, 1.0 / 2048);
  }
  for (const int width : {16, 48, 208}) {
    between<float>(width, 1e-5);
    between<Bfloat16Bits>(width, 1.0 / 64);
  }
  for (const int width : {32, 96, 160, 256}) {
    group_norm<float>(width == 96 ? 1 : 7, width, 1e-5);
    group_norm<Bfloat16Bits>(width == 160 ? 1 : 5, width, 1.0 / 200);
  }
  return wrong;
}
