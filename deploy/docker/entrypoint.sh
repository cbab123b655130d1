#!/bin/sh
# `thresher` with the kernels that were compiled when the image was built. numba takes a cache only where it can also
# write: so they are copied to where that is possible, also below a read-only root. Where it is not, or on another kind
# of CPU, kernels are compiled when they are first called.
cp -r /opt/thresher/kernels "$NUMBA_CACHE_DIR" 2>/dev/null
exec thresher "$@"
