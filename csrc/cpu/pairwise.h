// Sums over all pairs of two sets of vectors, and their gradients, tile by tile. What the pairwise operators share.
//
// Both sets are cut into panels. In round r the panel i of the set with fewer meets the panel (i + r) of the other, all
// of them side by side: no two threads write to the same rows, columns or gradients, there is one copy of each, and
// every sum has one order, whatever the number of threads. Where a set meets itself, each pair of panels meets once.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "pairwise_tile.h"

namespace voxtrast {

// What backward needs of one side: the log-sum-exps (B, count) and the gradients with respect to them.
struct SideGradient {
  const double* lse = nullptr;
  const float* gradient = nullptr;  // null: all zero
};

// Positives, whose similarities are subtracted from the sums; null where there are none.
struct Positives {
  const float* gradient = nullptr;  // (B, N)
  int64_t offset = 0;               // the positive of query i is key i + offset, unless ranges are given:
  const int64_t *first = nullptr, *last = nullptr;  // (B, N) the positives of i are first .. last without i itself, and
                                                    // to each of them i is a positive too; for a set with itself
};

// (first, second) float64 on the device of `like`.
torch::stable::Tensor new_doubles(const torch::stable::Tensor& like, int64_t first, int64_t second);

// Data of a contiguous tensor that must have that type and count of elements.
const double* double_data(const torch::stable::Tensor& tensor, int64_t count, const char* name);
const int64_t* whole_data(const torch::stable::Tensor& tensor, int64_t count, const char* name);

class Pairwise {
 public:
  // query (B, N, C), key (B, M, C), float32, bfloat16 or float16, contiguous. Where `same`, key is query. The pairs
  // (i, i + excluded) take no part; kNoDiagonal for none.
  Pairwise(const torch::stable::Tensor& query, const torch::stable::Tensor& key, bool same, double scale,
           int64_t excluded);

  // row_lse[i] = log sum_j exp(scale <q_i, k_j>) and, unless it is null, column_lse[j] = log sum_i of the same.
  void log_sum_exponentials(double* row_lse, double* column_lse) const;

  // Gradients of  sum_i row_i row_lse_i + sum_j column_j column_lse_j - sum over i and its positives j of positive_i s_ij.
  // grad_query (B, N, C) and grad_key (B, M, C) have the type of the vectors and may be null. Where `same`, grad_query
  // gets the sum of both.
  void differentiate(const SideGradient& row, const SideGradient& column, const Positives& positives,
                     torch::stable::Tensor* grad_query, torch::stable::Tensor* grad_key) const;

  // row_sum[i] = sum_j log(1 + exp(s_ij - shift)), s_ij = scale <q_i, k_j>
  void softplus_sums(double shift, double* row_sum) const;

  // Gradients of sum_i row_i row_sum_i.
  void differentiate_softplus(double shift, const float* row, torch::stable::Tensor* grad_query,
                              torch::stable::Tensor* grad_key) const;

  // similarity[i] = scale <q_i, k_(i + offset)>
  void paired(int64_t offset, double* similarity) const;

  // similarity[i] = mean of scale <q_i, q_j> over j = first[i] .. last[i] without i; 0 where there is none.
  void mean_over(const int64_t* first, const int64_t* last, double* similarity) const;

 private:
  struct Vectors {
    std::vector<float> own;  // empty where the tensor is used in place
    const float* data = nullptr;
    std::vector<float> largest_norm;  // of each problem
  };

  // Calls work(problem) for all problems, side by side where they are many or small.
  template <typename Work>
  void each_problem(const Work& work) const;
  // Calls work(tile, row, column) for all tiles of a problem in the order that the head of this file describes. Tiles of
  // different panels run side by side.
  template <typename Work>
  void each_tile(int64_t problem, const Work& work) const;
  template <typename Work>
  void each_tile_of(int64_t problem, int64_t row_panel, int64_t column_panel, const Work& work) const;

  // Calls weigh(problem, tile, row, column, matrix) for all tiles, multiplies and writes the gradients.
  template <typename Weigh>
  void accumulate(double factor, torch::stable::Tensor* grad_query, torch::stable::Tensor* grad_key,
                  const Weigh& weigh) const;
  // Whether a tile stands for its mirror image below the diagonal too.
  bool mirrored(int64_t row, int64_t column) const { return same_ && row / row_panel_ != column / row_panel_; }

  struct Factors {
    std::vector<float> shift, factor;
  };
  Factors factors(int64_t problem, const SideGradient& side, int64_t count, double unit) const;
  std::vector<float> positive_factors(int64_t problem, const Positives& positives, double unit) const;
  void subtract(int64_t problem, const Positives& positives, const std::vector<float>& factor, const Tile& tile,
                int64_t first_row, int64_t first_column, float* matrix) const;
  std::pair<Exponent, float> threshold(double shift) const;

  Vectors convert(const torch::stable::Tensor& given) const;
  void write(const std::vector<float>& gradient, double factor, torch::stable::Tensor& target) const;
  Exponent exponent(int64_t problem) const;
  bool uses_shift(int64_t problem) const { return exponent_[problem].shift >= 0.0f; }

  const Kernels& kernels_;
  int64_t batch_, rows_, columns_, channels_, width_;
  int64_t row_panel_, column_panel_;  // vectors of a panel
  int64_t excluded_pair_;
  bool same_, small_;
  double scale_;
  float no_similarity_;  // the one whose exponential is zero
  Vectors query_, key_;
  std::vector<float> packed_;        // (B, strips, width, strip)
  std::vector<Exponent> exponent_;   // of each problem; the shift is negative where a maximum must be kept
};

}  // namespace voxtrast
