// Points sorted by the cell that they fall into: the transpose of the interpolation reads these lists instead of
// adding at random places.
//
// The order within a list is that of the threads' arrival, so whoever sums over one must not depend on it.
#pragma once

#include "zeros.cuh"

namespace voxtrast {

// Cells whose lists lie side by side. One more slot after each such group says where its last list ends.
constexpr uint32_t kGroupOfCells = 1024;

// Where the list of a cell begins.
__device__ inline uint32_t slot_of_cell(uint32_t cell) { return cell + cell / kGroupOfCells; }

// The lists of one volume: list i is points[slots[i]] .. points[slots[i + 1]]. A cell has one voxel at each corner,
// also outside the volume, so that there is one cell more than voxels along every axis.
template <int D>
struct CellLists {
  Volume<D> volume;
  uint32_t groups;        // of cells
  uint32_t slots_of_item;
  uint32_t* slots;        // (B, slots_of_item)
  uint32_t* points;       // (B, volume.points)
  uint32_t* used;         // (B,), points in all lists

  // lowest: the coordinates of the cell's lowest corner, -1 at least
  __device__ uint32_t slot(const int32_t* lowest) const {
    uint32_t cell = 0;
#pragma unroll
    for (int axis = 0; axis < D; ++axis) cell = cell * (volume.size[axis] + 1) + (lowest[axis] + 1);
    return slot_of_cell(cell);
  }
};

// 32-bit words of scratch memory that the lists take.
template <int D>
int64_t words_of_lists(const Volume<D>& volume, int64_t batch) {
  int64_t cells = 1;
  for (int axis = 0; axis < D; ++axis) cells *= volume.size[axis] + int64_t(1);
  return batch * (divide_up(cells, kGroupOfCells) * (kGroupOfCells + 1) + volume.points + 1);
}

template <int D>
CellLists<D> lists_in(const Volume<D>& volume, int64_t batch, uint32_t* words) {
  const int64_t slots = words_of_lists(volume, 1) - volume.points - 1;
  return {volume, static_cast<uint32_t>(slots / (kGroupOfCells + 1)), static_cast<uint32_t>(slots), words,
          words + batch * slots, words + batch * (slots + volume.points)};
}

// First counts the points of each cell (Fill false), then puts them into their lists from the end on (Fill true).
template <int D, bool Fill>
__global__ void __launch_bounds__(kThreads)
    visit_cells(CellLists<D> lists, Tiles tiles, const float* displacement, const float* mask) {
  const auto place = tiles.place(blockIdx.x);
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  const int64_t points = lists.volume.points;
  if (point >= points) return;
  if (mask != nullptr && mask[place.item * points + point] == 0.0f) return;
  const Cell<D> cell(lists.volume, static_cast<uint32_t>(point), displacement + place.item * D * points + point);
#pragma unroll
  for (int axis = 0; axis < D; ++axis)
    if (cell.share[axis][0] == 0.0f && cell.share[axis][1] == 0.0f) return;
  uint32_t* slot = lists.slots + place.item * lists.slots_of_item + lists.slot(cell.lower);
  if constexpr (Fill) {
    const uint32_t position = atomicAdd(slot, ~0u) - 1;
    lists.points[place.item * points + position] = static_cast<uint32_t>(point);
  } else {
    atomicAdd(slot, 1u);
  }
}

struct Placing {
  uint32_t sums[kThreads];
  uint32_t begin;
};

// Replaces the counts of a group of cells by the ends of their lists. Which part of the memory a group gets depends on
// its arrival.
template <int D>
__global__ void __launch_bounds__(kThreads) place_lists(CellLists<D> lists) {
  constexpr int kShare = kGroupOfCells / kThreads;
  auto& [sums, begin] = *shared_memory<Placing>();
  const int64_t item = blockIdx.x / lists.groups;
  const int64_t first = item * lists.slots_of_item + int64_t(blockIdx.x % lists.groups) * (kGroupOfCells + 1);
  uint32_t* slots = lists.slots + first + threadIdx.x * kShare;
  uint32_t end[kShare], sum = 0;
#pragma unroll
  for (int n = 0; n < kShare; ++n) end[n] = sum += slots[n];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = 1; step < kThreads; step *= 2) {
    const uint32_t before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  if (threadIdx.x == kThreads - 1) begin = atomicAdd(lists.used + item, sums[threadIdx.x]);
  __syncthreads();
  const uint32_t before = begin + sums[threadIdx.x] - sum;
#pragma unroll
  for (int n = 0; n < kShare; ++n) slots[n] = before + end[n];
  if (threadIdx.x == kThreads - 1) slots[kShare] = before + sum;
}

// Sorts the points by cell. A point without weight in mask (if any) is in no list.
template <int D, typename Launch>
void run_sort_points(const CellLists<D>& lists, int64_t batch, const float* displacement, const float* mask,
                     const Launch& launch) {
  const Tiles grid = tiles_of(lists.volume.points, 1);
  const dim3 blocks = blocks_of(grid, batch);
  run_write_zeros(lists.slots, words_of_lists(lists.volume, batch) - batch * int64_t(lists.volume.points + 1), launch);
  run_write_zeros(lists.used, batch, launch);
  launch(&visit_cells<D, false>, blocks, dim3(kThreads), 0, lists, grid, displacement, mask);
  launch(&place_lists<D>, dim3(static_cast<unsigned>(batch * lists.groups)), dim3(kThreads), sizeof(Placing), lists);
  launch(&visit_cells<D, true>, blocks, dim3(kThreads), 0, lists, grid, displacement, mask);
}

}  // namespace voxtrast
