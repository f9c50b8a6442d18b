// The operators of star_fast._C, each schema once, and the facts of this build as a Python module.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

namespace {

// logits (B, V) float32, bfloat16 or float16; uncond (B, V) or None; image_index (B) int64; seed_at, position_at: 0-d
// int64 or None (then the plain number counts); out (B) int64; bad_rows (1) int32: CUDA sets it to 1 where the CPU
// raises.
TORCH_LIBRARY(star_fast, m) {
  m.def(
      "sample_tokens(Tensor logits, Tensor? uncond, Tensor image_index, Tensor? seed_at, int seed, "
      "Tensor? position_at, int position, float temperature, int top_k, float top_p, float guidance, "
      "Tensor(a!) out, Tensor(b!)? bad_rows) -> ()");
  // CPU only. qkv (R, 3, H, E); k, v as Layout in decode_step.h says, changed at `position`; scales (R, H, blocks of 16
  // positions * 16) float32 with an int8 cache; rotary (T, E/2, 2); out (R, H, E).
  m.def(
      "decode_attention_blocks(Tensor qkv, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
      "int position, Tensor? rotary, Tensor(e!) out) -> ()");
  // CPU only. Contents stay as they are.
  m.def("large_pages(Tensor(a!) memory) -> ()");
  // CPU only. x, residual, normed, sum (..., D) contiguous; weight (D). Keys, limit and scale of the dropout mask;
  // scale 0: none, then without a residual there is no sum.
  m.def(
      "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, int row_key, int column_key, int limit, "
      "float scale, Tensor(a!) normed, Tensor(b!)? sum) -> ()");
  // CPU only. h is the sum above; gradients (..., D) contiguous; dweight (D) float32.
  m.def(
      "add_rms_norm_backward(Tensor h, Tensor weight, Tensor? dnormed, Tensor? dsum, float eps, int row_key, "
      "int column_key, int limit, float scale, Tensor(a!)? dh, Tensor(b!)? dx, Tensor(c!) dweight) -> ()");
  // CPU only. w1w3, dw1w3 (..., 2F), out, dout (..., F), contiguous.
  m.def("swiglu(Tensor w1w3, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor w1w3, Tensor dout, Tensor(a!) dw1w3) -> ()");
  // CPU only. x (R, K) contiguous float32 or bfloat16; packed (tiles, K padded / 4, 16, 4) int8, weight_scale (N
  // padded) float32 and correction (N padded) int32 as in csrc/int8_product.h; columns N; returns (R, N) of x's dtype.
  m.def("int8_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor correction, int columns) -> Tensor");
  // CPU only. x, out (B, C, H, W) channels last; weight, bias (C).
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor(a!) out) -> ()");
}

}  // namespace

#ifdef STAR_FAST_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif
#ifndef STAR_FAST_ARCHS
#define STAR_FAST_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of star_fast (torch.ops.star_fast) and how they were built.";
  m.attr("has_cuda") = kHasCuda;
  m.attr("archs") = std::string(STAR_FAST_ARCHS);
}
