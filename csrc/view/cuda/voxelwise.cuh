// The steps that change voxels one by one, as many as one pass can carry out: the same formulas as pointwise.inl and
// random.inl, with CUDA's own functions in place of their polynomials.
#pragma once

#include "../../geometry/random.h"
#include "statistics.cuh"

namespace voxtrast {

__device__ inline float between(float low, float high, float fraction) { return low + fraction * (high - low); }

__device__ inline float power_or_zero(float exponent) { return exponent < -100.0f ? 0.0f : exp2f(exponent); }

__device__ inline float gamma_of(float v, const StepFacts& facts, float exponent, bool inverted) {
  const float range = facts.high - facts.low, scale = 1.0f / range;
  const float from = inverted ? facts.high : facts.low, sign = inverted ? -1.0f : 1.0f;
  const float x = (sign * scale) * (v - from);
  return from + (sign * range) * (x > 0x1p-100f ? power_or_zero(exponent * log2f(x)) : 0.0f);
}

__device__ inline float bezier_of(float v, const StepFacts& facts, const float* entries) {
  const float range = facts.high - facts.low, x = (kBezierEntries - 1) / range * (v - facts.low);
  // Neither NaN nor what is beyond the integers may decide which entry is read.
  const int32_t entry = !(x > 0.0f) ? 0 : x < float(kBezierEntries - 2) ? int32_t(x) : kBezierEntries - 2;
  return facts.low + range * between(entries[entry], entries[entry + 1], x - float(entry));
}

// For the steps that note() of step_rules.h follows the range through.
__device__ inline float in_order(const StepRecord& step, const float* numbers, const StepFacts& facts, float v) {
  if (step.kind == StepKind::brightness) return v + numbers[0];
  if (step.kind == StepKind::contrast) return facts.mean + numbers[0] * (v - facts.mean);
  if (step.kind == StepKind::gamma && facts.high > facts.low) return gamma_of(v, facts, numbers[0], numbers[1] != 0.0f);
  return v;
}

// By one thread, before the others meet it at a barrier. Where a step does not ask, its facts mean nothing.
__device__ inline void follow_statistics(const Run& run, const uint8_t* block, uint32_t voxels, StepFacts* facts) {
  if (threadIdx.x != 0 || run.known == nullptr) return;
  ViewStatistics known = *run.known;
  for (int32_t n = 0; n < run.step_count; ++n) {
    const StepRecord& step = table<StepRecord>(block, run.steps)[n];
    const float* numbers = table<float>(block, step.numbers);
    const StepFacts found = {static_cast<float>(known.sum / static_cast<double>(voxels)), known.low, known.high};
    facts[n] = found;
    if (step.kind == StepKind::brightness) known.sum += static_cast<double>(numbers[0]) * voxels;
    known.low = in_order(step, numbers, found, found.low);
    known.high = in_order(step, numbers, found, found.high);
  }
}

__device__ inline void normal_pair(uint32_t one, uint32_t other, float* two) {
  const float u = static_cast<float>((one >> 8) + 1) * 0x1p-24f, squared = -2.0f * logf(u);
  const float radius = sqrtf(squared > 0.0f ? squared : 0.0f);
  float sine, cosine;
  sincospif(static_cast<float>(static_cast<int32_t>(other)) * 0x1p-31f, &sine, &cosine);
  two[0] = radius * cosine;
  two[1] = radius * sine;
}

__device__ inline void add_noise(const Run& run, const StepRecord& step, float std, const Quad& quad,
                                 float (&values)[kQuad]) {
  const Random4 random = philox(run.seed, quad.first / kQuad, step.stream, run.slot, run.step);
  float numbers[kQuad];
  normal_pair(random.word[0], random.word[1], numbers);
  normal_pair(random.word[2], random.word[3], numbers + 2);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) values[k] += std * numbers[k];
}

__device__ inline void fill(const Run& run, const uint8_t* block, const StepRecord& step, const float* numbers,
                            const Quad& quad, float (&values)[kQuad]) {
  const int32_t* boxes = table<int32_t>(block, step.boxes);
  const bool outside = step.kind == StepKind::out_paint || step.kind == StepKind::cut_out_outside;
  bool chosen[kQuad] = {outside, outside, outside, outside};
  for (int32_t n = 0; n < step.box_count; ++n)
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
      if (in_box(boxes + 6 * n, quad.d[k], quad.h[k], quad.w[k])) chosen[k] = !outside;
  const bool random = step.kind == StepKind::in_paint || step.kind == StepKind::out_paint;
  Random4 words = {};
  if (random) words = philox(run.seed, quad.first / kQuad, step.stream, run.slot, run.step);
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (chosen[k]) values[k] = random ? between(numbers[0], numbers[1], uniform(words.word[k])) : numbers[0];
}

// Along an axis the coordinates of a bias field run from -1 to 1.
__device__ inline float bias_coordinate(int32_t index, int32_t size) {
  return size > 1 ? 2.0f * static_cast<float>(index) / static_cast<float>(size - 1) - 1.0f : 0.0f;
}

__device__ inline void add_bias_field(const int32_t (&size)[3], const float* numbers, const Quad& quad,
                                      float (&values)[kQuad]) {
  float cubic[4];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k == 0 || quad.w[k] == 0) {
      const float d = bias_coordinate(quad.d[k], size[0]), h = bias_coordinate(quad.h[k], size[1]);
      const float depth[4] = {1.0f, d, d * d, d * d * d}, height[4] = {1.0f, h, h * h, h * h * h};
      int term = 1;
      cubic[0] = cubic[1] = cubic[2] = cubic[3] = 0.0f;
#pragma unroll
      for (int i = 0; i <= 3; ++i)
#pragma unroll
        for (int j = 0; i + j <= 3; ++j)
#pragma unroll
          for (int m = 0; i + j + m <= 3; ++m) cubic[m] += numbers[term++] * (depth[i] * height[j]);
    }
    const float x = bias_coordinate(quad.w[k], size[2]);
    float exponent = (((cubic[3] * x + cubic[2]) * x + cubic[1]) * x + cubic[0]) * 1.4426950408889634f;
    exponent = exponent > 120.0f ? 120.0f : exponent;
    values[k] = numbers[0] + (values[k] - numbers[0]) * power_or_zero(exponent);
  }
}

__device__ inline void perform_steps(const PassJob& job, const uint8_t* block, const StepFacts* facts,
                                     const Quad& quad, float (&values)[kQuad]) {
  for (int32_t n = 0; n < job.run.step_count; ++n) {
    const StepRecord& step = table<StepRecord>(block, job.run.steps)[n];
    const float* numbers = table<float>(block, step.numbers);
    switch (step.kind) {
      case StepKind::noise: add_noise(job.run, step, numbers[0], quad, values); break;
      case StepKind::bias_field: add_bias_field(job.size, numbers, quad, values); break;
      case StepKind::brightness:
      case StepKind::contrast:
      case StepKind::gamma:
#pragma unroll
        for (int k = 0; k < kQuad; ++k) values[k] = in_order(step, numbers, facts[n], values[k]);
        break;
      case StepKind::bezier:
        if (!(facts[n].high > facts[n].low)) break;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) values[k] = bezier_of(values[k], facts[n], numbers);
        break;
      default: fill(job.run, block, step, numbers, quad, values);
    }
  }
}

// The end of a pass over a view. Shared memory: the facts of the steps, before which all threads have met.
__device__ inline void finish_pass(const PassJob& job, const uint8_t* block, const StepFacts* facts, const Quad& quad,
                                   float (&values)[kQuad]) {
  if (quad.count > 0) {
    perform_steps(job, block, facts, quad, values);
    if (job.to != nullptr) store_quad(job.to, quad, values);
  }
  if (job.run.gathered != nullptr) gather_statistics(job.run, quad, values);
}

// grid (tiles, slots)
__global__ void __launch_bounds__(kViewThreads) pass_over_views(const uint8_t* block, Offset jobs) {
  const PassJob& job = table<PassJob>(block, jobs)[blockIdx.y];
  if (blockIdx.x * uint32_t(kTile) >= job.voxels) return;
  StepFacts* const facts = shared_memory<StepFacts>();
  follow_statistics(job.run, block, job.voxels, facts);
  __syncthreads();
  const Quad quad = quad_of(job);
  float values[kQuad] = {};
  if (quad.count > 0) load_quad(job.from, quad, values);
  finish_pass(job, block, facts, quad, values);
}

}  // namespace voxtrast
