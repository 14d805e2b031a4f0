// The kernels of one instruction set. Compiled once for each, with -DATTNJAX_ISA=<its name> and its compiler flags.
#include "backward.h"
#include "decode.h"
#include "forward.h"

#define ATTNJAX_TEXT_(x) #x
#define ATTNJAX_TEXT(x) ATTNJAX_TEXT_(x)

namespace attnjax::ATTNJAX_ISA {
namespace {

[[maybe_unused]] bool in_pairs(const Call& c) { return c.query.type == Type::bf16; }

template <class A>
void forward(const Call& c, const Run& run) {
  if (Decode<A>::takes(c)) return Decode<A>::run(c, run);
  if constexpr (kMultipliesPairs && sizeof(A) == 4)
    if (in_pairs(c)) return Forward<A, uint32_t>::run(c, run);
  Forward<A, A>::run(c, run);
}

template <class A>
void backward(const Call& c, const Run& run) {
  if constexpr (kMultipliesPairs && sizeof(A) == 4)
    if (in_pairs(c)) return Backward<A, uint32_t>::run(c, run);
  Backward<A, A>::run(c, run);
}

}  // namespace

extern const Kernels kernels = {
    ATTNJAX_TEXT(ATTNJAX_ISA),
    [](const Call& c, const Run& run) { c.wide ? forward<double>(c, run) : forward<float>(c, run); },
    [](const Call& c, const Run& run) { c.wide ? backward<double>(c, run) : backward<float>(c, run); },
};

}  // namespace attnjax::ATTNJAX_ISA
