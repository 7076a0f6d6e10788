// The kernels of csrc/view/cuda and the programs that launch them, on the CPU.
#include "emulation.h"

#include "view/cuda/program.cpp"
#include "view/cuda/run_program.cuh"
#include "view/cuda/sent_slots.h"
#include "view/cuda/stages.cpp"

namespace {

using namespace voxtrast;

// Memory of the device for the time of a call.
struct Lent : emulation::Guarded {
  explicit Lent(size_t bytes) : Guarded(bytes, 16) {}
  ~Lent() { release(); }
};

}  // namespace

extern "C" const char* make_views(int64_t count, const int64_t* numbers, int64_t* launches) {
  return emulation::report([=] {
    const SentSlots sent(count, numbers);
    const Lent scratch(scratch_bytes(sent.slots()));
    const ViewProgram program = make_program(sent.slots(), scratch.begin);
    const Lent block(program.block.size());
    memcpy(block.begin, program.block.data(), program.block.size());
    count_launches(program, launches);
    run_program(program, block.begin, emulation::Launch());
  });
}
