// Selective attention and SAS on a CPU. Plain C functions on pointers: nothing here knows PyTorch.
#include "backward.h"
#include "expand.h"
#include "forward.h"
#include "slots.h"

#ifndef HEEDFUL_SCALAR
#define HEEDFUL_SCALAR float
#endif

extern "C" {
int heedful_job_bytes() { return int(sizeof(heedful::Job)); }
int heedful_slots_bytes() { return int(sizeof(heedful::Slots)); }
int heedful_expand_bytes() { return int(sizeof(heedful::Expand)); }
void heedful_forward(const heedful::Job* job) { heedful::Forward<HEEDFUL_SCALAR>(*job).run(); }
void heedful_backward(const heedful::Job* job) { heedful::Backward<HEEDFUL_SCALAR>(*job).run(); }
void heedful_slots(const heedful::Slots* job) { heedful::Step<HEEDFUL_SCALAR>(*job).run(); }
void heedful_expand(const heedful::Expand* job) { heedful::Expansion<HEEDFUL_SCALAR>(*job).forward(); }
void heedful_expand_backward(const heedful::Expand* job) { heedful::Expansion<HEEDFUL_SCALAR>(*job).backward(); }
}
