// The kernels of one instruction set. Compiled once for each, with -DATTNJAX_ISA=<its name> and its compiler flags.
#include "backward.h"
#include "decode.h"
#include "forward.h"

#define ATTNJAX_TEXT_(x) #x
#define ATTNJAX_TEXT(x) ATTNJAX_TEXT_(x)

namespace attnjax::ATTNJAX_ISA {
namespace {

template <class A>
void forward(const Call& c, const Run& run) {
  if (Decode<A>::takes(c))
    Decode<A>::run(c, run);
  else
    Forward<A>::run(c, run);
}

}  // namespace

extern const Kernels kernels = {
    ATTNJAX_TEXT(ATTNJAX_ISA),
    [](const Call& c, const Run& run) { c.wide ? forward<double>(c, run) : forward<float>(c, run); },
    [](const Call& c, const Run& run) { c.wide ? Backward<double>::run(c, run) : Backward<float>::run(c, run); },
};

}  // namespace attnjax::ATTNJAX_ISA
