// The Python face of the native core: checks shapes and ranges, keeps arrays alive, releases the GIL. No arithmetic.
#include "bindings.h"

using namespace pagemill;

NB_MODULE(_native, m) {
    m.doc() = "Native core of Pagemill; use it through pagemill.kernels, which checks shapes and explains errors.";
    bind_weights(m);
    bind_model(m);
    bind_sampling(m);
    bind_measure(m);
    bind_policies(m);
}
