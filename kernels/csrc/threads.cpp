// The team of threads as a caller sees it.
#include "pool.h"

extern "C" {

void shoal_set_threads(int threads, long spin_ns) { shoal::pool().resize(threads, spin_ns); }

}  // extern "C"
