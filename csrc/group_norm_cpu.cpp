// GroupNorm and SiLU on the CPU in two passes over channels-last images. Semantics: star_fast/ops/group_norm_silu.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"
#include "scalars.h"

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#define STAR_FAST_ROWS "group_norm_rows.h"
#include "each_instruction_set.h"

constexpr int64_t kEntriesAPart = 16384;  // summed in float32: few enough to lose no digits, and 32 or 64 KiB
constexpr int64_t kPartsWorthAThread = 4;

// An image as rows of `width` entries, and the rows as parts: the same on any number of threads, so that the sums'
// bits are.
struct Layout {
  Layout(int64_t channels, int64_t pixels)
      : width(std::lcm(channels, int64_t(baseline::kBlock))), rows(pixels * channels / width),
        rows_a_part(std::max<int64_t>(1, kEntriesAPart / width)), parts((rows + rows_a_part - 1) / rows_a_part) {}

  int64_t width, rows, rows_a_part, parts;
};

// Scale and shift of one image's channels, so that x * scale + shift is the normalised x: from its parts' sums about a
// number near each channel's mean, in double. `sums`, `scale` and `shift` are in the order of a row, `channel_at`;
// `center` in that of the channels.
template <class T>
void scale_and_shift(const Layout& layout, const std::vector<int>& channel_at, const T* center, const float* sums,
                     const T* weight, const T* bias, int64_t channels, int64_t groups, double eps, float* scale,
                     float* shift) {
  std::vector<double> sum(channels, 0.0), square(channels, 0.0), by(channels), to(channels);
  for (int64_t part = 0; part < layout.parts; ++part, sums += 2 * layout.width) {
    for (int64_t e = 0; e < layout.width; ++e) {
      sum[channel_at[e]] += sums[e];
      square[channel_at[e]] += sums[layout.width + e];
    }
  }
  const int64_t together = channels / groups;
  const double pixels = double(layout.rows) * double(layout.width) / double(channels);
  for (int64_t first = 0; first < channels; first += together) {
    double mean = 0.0, variance = 0.0;
    for (int64_t c = first; c < first + together; ++c)
      mean += (to_float(center[c]) + sum[c] / pixels) / double(together);
    for (int64_t c = first; c < first + together; ++c) {
      const double off = to_float(center[c]) - mean;
      variance += (square[c] / pixels + off * (2.0 * sum[c] / pixels + off)) / double(together);
    }
    const double inverse = 1.0 / std::sqrt(std::max(variance, 0.0) + eps);
    for (int64_t c = first; c < first + together; ++c) {
      by[c] = inverse * to_float(weight[c]);
      to[c] = to_float(bias[c]) - mean * by[c];
    }
  }
  for (int64_t e = 0; e < layout.width; ++e) {
    scale[e] = float(by[channel_at[e]]);
    shift[e] = float(to[channel_at[e]]);
  }
}

template <class T>
void normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
               bool silu, at::Tensor& out) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3), entries = channels * pixels;
  const Layout layout(channels, pixels);
  const int64_t width = layout.width, parts = layout.parts;
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const T* weights = static_cast<const T*>(weight.const_data_ptr());
  const T* biases = static_cast<const T*>(bias.const_data_ptr());
  std::vector<float> center(images * width), scale(images * width), shift(images * width),
      sums(images * parts * 2 * width);
  const auto rows_of = [&](int64_t part) {
    return int(std::min(layout.rows_a_part, layout.rows - part * layout.rows_a_part));
  };
  const auto place_of = [&](int64_t image, int64_t part) {
    return image * entries + part * layout.rows_a_part * width;
  };

  std::vector<int> channel_at(width);
  for (int64_t e = 0; e < width; ++e) channel_at[e] = int(baseline::entry_at<T>(int(e)) % channels);
  for (int64_t image = 0; image < images; ++image)  // a channel's first pixel is near enough to its mean
    for (int64_t e = 0; e < width; ++e) center[image * width + e] = to_float(from[image * entries + channel_at[e]]);
  const auto one_part_sums = STAR_FAST_HERE(part_sums);
  at::parallel_for(0, images * parts, kPartsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts, part = i % parts;
      float* into = sums.data() + i * 2 * width;
      one_part_sums(from + place_of(image, part), rows_of(part), int(width), center.data() + image * width, into,
                    into + width);
    }
  });
  for (int64_t image = 0; image < images; ++image)
    scale_and_shift(layout, channel_at, from + image * entries, sums.data() + image * parts * 2 * width, weights,
                    biases, channels, groups, eps, scale.data() + image * width, shift.data() + image * width);
  const auto one_part_scaled = STAR_FAST_HERE(part_scaled);
  at::parallel_for(0, images * parts, kPartsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {  // what was summed last is still in the cache
      const int64_t image = i / parts, part = i % parts, place = place_of(image, part);
      one_part_scaled(from + place, rows_of(part), int(width), scale.data() + image * width,
                      shift.data() + image * width, silu, to + place);
    }
  });
}

void group_norm_silu_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups,
                         double eps, bool silu, at::Tensor& out) {
  const auto beside = [&](const at::Tensor& t) {
    return t.numel() == x.size(1) && t.scalar_type() == x.scalar_type() && t.is_contiguous();
  };
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0 && groups > 0 && x.size(1) % groups == 0 && beside(weight) &&
                        beside(bias) && x.is_contiguous(at::MemoryFormat::ChannelsLast) && out.sizes() == x.sizes() &&
                        out.scalar_type() == x.scalar_type() && out.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "group_norm_silu: tensors do not fit together, or are not channels last");
  TORCH_CHECK_VALUE(x.size(1) * x.size(2) * x.size(3) % std::lcm(x.size(1), int64_t(baseline::kBlock)) == 0,
                    "group_norm_silu: an image's pixels must fill rows of a multiple of 32 entries");
  if (x.scalar_type() == at::kFloat) return normalise<float>(x, weight, bias, groups, eps, silu, out);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "group_norm_silu: expected float32 or bfloat16, got ",
                   x.scalar_type());
  normalise<Bfloat16Bits>(x, weight, bias, groups, eps, silu, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("group_norm_silu", &group_norm_silu_cpu); }

}  // namespace star_fast
