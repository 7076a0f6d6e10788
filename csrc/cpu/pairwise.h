// Sums over all pairs of two sets of vectors, and their gradients, tile by tile. What the pairwise operators share.
//
// Both sets are cut into panels. In round r the panel i of the set with fewer meets the panel (i + r) of the other, all
// of them side by side: no two threads write to the same rows, columns or gradients, there is one copy of each, and
// every sum has one order, whatever the number of threads. Where a set meets itself, each pair of panels meets once.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "interpolation.h"
#include "memory.h"
#include "pairwise_tile.h"

namespace voxtrast {

constexpr double kLog2E = 1.4426950408889634;

inline int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// (first, second) float64 on the device of `like`.
torch::stable::Tensor new_doubles(const torch::stable::Tensor& like, int64_t first, int64_t second);

// The sum, (1,) float32.
torch::stable::Tensor sum_to_scalar(const std::vector<double>& numbers, const torch::stable::Tensor& like);

// Data of a contiguous tensor that must have that type and count of elements.
const double* double_data(const torch::stable::Tensor& tensor, int64_t count, const char* name);
const int64_t* whole_data(const torch::stable::Tensor& tensor, int64_t count, const char* name);

// Uninitialised, of the shape and type of `vectors`.
torch::stable::Tensor new_gradient(const torch::stable::Tensor& vectors);

struct PairwiseOptions {
  double scale = 1.0;
  bool same = false;                 // the keys are the queries
  bool normalize = false;            // to unit length; a vector without direction becomes zeros
  int64_t excluded = kNoDiagonal;    // the pairs (i, i + excluded) take no part
  const int64_t* order = nullptr;    // (orders, N): vector i is the one at order[i]; both sets alike
  int64_t orders = 1;                // one for all problems, or one for each
};

// What backward needs of one side of a problem: the log-sum-exps and the gradients with respect to them.
struct SideGradient {
  const double* lse = nullptr;
  const float* gradient = nullptr;  // null: all zero
};

// Positives of a problem, whose similarities are subtracted from the sums; null where there are none.
struct Positives {
  const float* gradient = nullptr;  // (N)
  int64_t offset = 0;               // the positive of query i is key i + offset, unless ranges are given:
  const int64_t* first = nullptr;   // (N) the positives of i are first .. last without i itself, and to each of them i
  const int64_t* last = nullptr;    // is a positive too; for a set with itself
};

// One problem: its vectors in float32, padded with zeros to whole vector registers, normalised where asked for.
class Problem {
 public:
  int64_t index = 0;  // in the batch

  // row_lse[i] = log sum_j exp(scale <q_i, k_j>) and, unless it is null, column_lse[j] = log sum_i of the same.
  void log_sum_exponentials(double* row_lse, double* column_lse);

  // row_sum[i] = sum_j log(1 + exp(s_ij - shift)), s_ij = scale <q_i, k_j>
  void softplus_sums(double shift, double* row_sum);

  // similarity[i] = scale <q_i, k_(i + offset)>
  void paired(int64_t offset, double* similarity) const;

  // similarity[i] = mean of scale <q_i, q_j> over j = first[i] .. last[i] without i; 0 where there is none.
  void mean_over(const int64_t* first, const int64_t* last, double* similarity);

  // Gradients, for `write`, of
  //   sum_i row_i row_lse_i + sum_j column_j column_lse_j - sum over i and its positives j of positive_i s_ij.
  // Where the set meets itself, those of the queries hold both.
  void differentiate(const SideGradient& row, const SideGradient& column, const Positives& positives, bool need_key);

  // The same of sum_i row_i row_sum_i.
  void differentiate_softplus(double shift, const float* row, bool need_key);

  // Writes the gradients of all vectors of this problem into (B, N, C) and, unless it is null, (B, M, C), of the type
  // of the vectors, and returns the gradient of the scale.
  double write(torch::stable::Tensor& grad_query, torch::stable::Tensor* grad_key);

 private:
  friend class Pairwise;

  struct Vectors {
    const torch::stable::Tensor* given;
    int64_t count;
    Buffer<float> memory, inverse_norms, gradients;
    Buffer<double> paired;  // each vector with its gradient
    const float* data = nullptr;
    float* gradient = nullptr;  // (count, width) in units of scale_ * unit_; null where it is not needed
    double largest_norm = 0.0;
  };
  struct Factors {
    Buffer<float> shift, factor;
  };

  Problem(const class Pairwise& pairs);
  void load(int64_t problem);
  void convert(Vectors& vectors) const;
  const int64_t* order() const;
  // Where vector n of the order stands here: the one tile is small enough to leave the vectors where they were.
  int64_t at(int64_t n) const { return places_ == nullptr ? n : places_[n]; }
  void pack();
  void find_whole();
  // Calls work(begin, end) for the items 0 .. count, side by side where the problem is worth it.
  template <typename Work>
  void side_by_side(int64_t count, int64_t cost, const Work& work) const;
  Exponent exponent(double largest_norm) const;
  Vectors& keys();
  const Vectors& keys() const;

  // Calls work(tile, row, column) for all tiles, in the order that the head of this file describes. Tiles of different
  // panels run side by side.
  template <typename Work>
  void each_tile(const Work& work) const;
  template <typename Work>
  void each_tile_of(int64_t row_panel, int64_t column_panel, const Work& work) const;
  // Whether a tile stands for its mirror image below the diagonal too.
  bool mirrored(int64_t row, int64_t column) const;
  // Calls weigh(tile, row, column, matrix) for all tiles and multiplies.
  template <typename Weigh>
  void accumulate(bool need_key, const Weigh& weigh);
  void find_factors(const SideGradient& side, int64_t count, Factors& result) const;
  // What each positive of a row takes off; null where there are none.
  const float* positive_factors(const Positives& positives);
  void subtract(const Positives& positives, const float* factor, const Tile& tile, int64_t row, int64_t column,
                float* matrix) const;
  std::pair<Exponent, float> threshold(double shift) const;
  double write(Vectors& vectors, torch::stable::Tensor& target);

  const class Pairwise& pairs_;
  Vectors query_, key_;
  Buffer<float> packed_;  // (strips, width, strip)
  Buffer<float> products_, weights_;
  Tile whole_;  // of a problem that is one tile, with known products
  const int64_t* places_ = nullptr;
  Buffer<double> sums_, column_sums_;
  Buffer<float> shifts_, column_shifts_, positive_, along_, by_;
  Factors row_factors_, column_factors_;
  Exponent exponent_;     // the shift is negative where a maximum must be kept
  double unit_ = 1.0;     // of the gradients: the largest upstream one
};

// A batch of problems of one size.
class Pairwise {
 public:
  // query (B, N, C), key (B, M, C), float32, bfloat16 or float16, contiguous.
  Pairwise(const torch::stable::Tensor& query, const torch::stable::Tensor& key, const PairwiseOptions& options);

  // Calls work(problem) for all problems, side by side where they are many or small.
  template <typename Work>
  void each_problem(const Work& work) const;

  const int64_t batch, rows, columns;

 private:
  friend class Problem;

  const Kernels& kernels_;
  const torch::stable::Tensor &query_, &key_;
  const PairwiseOptions options_;
  const int64_t channels_, width_;
  bool small_;                        // not worth a second thread
  bool one_tile_;                     // small, and no larger than a tile
  int64_t row_panel_, column_panel_;  // vectors of a panel
};

template <typename Work>
void Problem::side_by_side(int64_t count, int64_t cost, const Work& work) const {
  if (pairs_.small_) {
    work(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain(cost), work);
  }
}

template <typename Work>
void Pairwise::each_problem(const Work& work) const {
  const auto some = [&](int64_t begin, int64_t end) {
    Problem problem(*this);
    for (int64_t index = begin; index < end; ++index) {
      problem.load(index);
      work(problem);
    }
  };
  if (batch == 1 || (!small_ && batch < 128)) {
    some(0, batch);
    return;
  }
  const int64_t cost = rows * columns * width_ + 64 * (rows + columns) * width_;
  torch::stable::parallel_for(0, batch, 1 + 262144 / cost, some);
}

}  // namespace voxtrast
